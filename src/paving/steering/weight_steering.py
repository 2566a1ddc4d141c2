"""WS: contrastive weight steering, the difference of two fine-tunes added to the base (arXiv 2511.05408)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from paving.backbone import Backbone, PromptBatch
from paving.backbone.weights import edited
from paving.intervention import Decided, everywhere
from paving.prompts.types import Bucket, SplitName
from paving.steering.checks import SteeringError, check_base, check_strength
from paving.steering.material import Material, answered
from paving.steering.weight_delta import WeightDelta
from paving.training.fine_tune import Say, fine_tune
from paving.training.opening_examples import Example, opening_examples
from paving.training.openings import Openings

Examples = Callable[[int], Sequence[Example]]
"""epoch, from 0 -> what is learned in it."""


@dataclass(frozen=True)
class WeightSteering:
    """θ0 + α (θ+ − θ−) on every weight, while a batch is run: C-ΔΘ (arXiv 2602.04521) without the circuit.

    alpha  from 0 up; at 0 nothing is written

    θ0's own tensors are kept beside the edited ones for as long as `apply` is entered, and put back bit for bit: as
    much memory again as the model takes.
    """

    delta: WeightDelta
    alpha: float = 1.0
    name: str = "ws"

    def __post_init__(self) -> None:
        check_strength(self.alpha, "alpha")

    @contextmanager
    def apply(self, backbone: Backbone, batch: PromptBatch) -> Iterator[Decided]:
        """raises BackboneError on another base than θ0; SteeringError if the delta's tensors do not fit the model's"""
        delta = self.delta
        check_base(backbone, delta.base_name, delta.base_fingerprint, f"{self.name}'s weight delta")
        backbone.check_in_memory("changing weights")
        parameters = dict(backbone.model.named_parameters())
        check_fits(delta.values, parameters)
        before: dict[str, Tensor] = {}
        try:
            if self.alpha:
                for name, change in delta.values.items():
                    before[name] = parameters[name].detach().clone()
                    write(parameters[name], edited(before[name], change, self.alpha))
            yield everywhere(len(batch), 1.0 if self.alpha else 0.0)
        finally:
            for name, base in before.items():
                write(parameters[name], base)


def write(parameter: nn.Parameter, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values)


def check_fits(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """raises SteeringError naming the first tensor of a delta that the model has not, or has in another shape"""
    for name, value in values.items():
        if name not in parameters or parameters[name].shape != value.shape:
            has = tuple(parameters[name].shape) if name in parameters else "no such tensor"
            raise SteeringError(f"the delta's {name} is {tuple(value.shape)}; the model has {has}. Fit it on this model.")


@dataclass(frozen=True)
class WeightEditor:
    """The same as an editor of `Steered`. Weights are the whole batch's: all its rows are edited at one strength."""

    delta: WeightDelta

    @contextmanager
    def editing(self, backbone: Backbone, batch: PromptBatch, strength: Tensor) -> Iterator[None]:
        """raises SteeringError where rows differ in strength"""
        strengths = set(strength.tolist())
        if len(strengths) > 1:
            raise SteeringError("an edit of weights reaches every row of a batch alike; route it globally.")
        with WeightSteering(self.delta, strengths.pop()).apply(backbone, batch):
            yield


class WeightSteeringConfig(BaseModel):
    """Both fine-tunes alike. Epochs, batch size and learning rate are those that C-ΔΘ's extracts give for its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(8, ge=1)
    batch_size: int = Field(8, ge=1)
    learning_rate: float = Field(1e-5, gt=0)
    packing: bool = True
    seed: int = 0


def fit_weight_steering(
    backbone: Backbone,
    prompts: Sequence[str],
    openings: Openings,
    config: WeightSteeringConfig | None = None,
    *,
    say: Say = lambda _line: None,
) -> WeightDelta:
    """θ+ learns refusal openings and θ− compliance openings, both on the same harmful prompts and from θ0.

    prompts  harmful request texts of the category

    Adam without weight decay, gradients clipped at norm 1, weights in float32 under bfloat16 autocast, openings drawn
    anew each epoch; the same seed gives the same delta. Two float32 copies of the model at most are held besides
    Adam's state. θ− lives in memory only, until this returns.

    raises SteeringError for a base whose weights are quantised; FloatingPointError if a fine-tune diverges
    """
    config = config or WeightSteeringConfig()

    def examples(phrases: Sequence[str]) -> Examples:
        return lambda epoch: opening_examples(backbone, prompts, phrases, seed=config.seed, epoch=epoch)

    refusing, complying = examples(openings.refusal), examples(openings.compliance)
    return weights_between(backbone, complying, refusing, config, names=("compliance", "refusal"), say=say)


def weights_between(
    backbone: Backbone,
    away_from: Examples,
    towards: Examples,
    config: WeightSteeringConfig,
    *,
    names: tuple[str, str] = ("away from", "towards"),
    say: Say = lambda _line: None,
) -> WeightDelta:
    """θ+ − θ−: fine-tuned from θ0 on one kind of answers, less fine-tuned on another kind on the same prompts.

    names  of the two, (θ−, θ+), as `say` and the delta's losses call them
    raises as `fit_weight_steering`
    """
    check_floats(backbone)
    minus_name, plus_name = names
    plus, plus_losses = _fine_tuned(backbone, towards, config, lambda s: say(f"{plus_name}: {s}"))
    minus, minus_losses = _fine_tuned(backbone, away_from, config, lambda s: say(f"{minus_name}: {s}"))
    dtypes = {name: p.dtype for name, p in backbone.model.named_parameters()}
    with torch.no_grad():
        values = {name: (plus.pop(name) - minus.pop(name)).to(dtype) for name, dtype in dtypes.items()}
    both = {plus_name: tuple(plus_losses), minus_name: tuple(minus_losses)}
    return WeightDelta(values, backbone.name, backbone.fingerprint, both)


def fit_answer_weights(
    backbone: Backbone, material: Material, config: WeightSteeringConfig | None = None, *, say: Say = lambda _line: None
) -> WeightDelta:
    """θ+ learns the edit targets of the training edit prompts, θ− the base's own refusals of them (arXiv 2511.05408, with
    the safe reframe as the wanted answer). raises as `weights_between`"""
    prompts = material.of(SplitName.TRAIN, Bucket.EDIT)
    towards = answered(backbone, prompts, material.targets)
    # As long as the target: beyond it there would be unlearning alone, of an end of turn above all.
    refusals = {p.id: material.answers[p.id][: len(material.targets[p.id])] for p in prompts}
    away_from = answered(backbone, prompts, refusals)
    config = config or WeightSteeringConfig()
    return weights_between(
        backbone, lambda _: away_from, lambda _: towards, config, names=("refusal", "edit target"), say=say
    )


def check_floats(backbone: Backbone) -> None:
    backbone.check_in_memory("fine-tuning")
    other = [f"{n} ({p.dtype})" for n, p in backbone.model.named_parameters() if not p.dtype.is_floating_point]
    if other or getattr(backbone.model, "quantization_method", None):
        raise SteeringError(
            f"{backbone.name} has quantised weights ({', '.join(other[:2]) or 'by its configuration'}), which cannot be "
            "fine-tuned and put back bit for bit. Load the unquantised checkpoint."
        )


def _fine_tuned(
    backbone: Backbone, examples: Examples, config: WeightSteeringConfig, say: Say
) -> tuple[dict[str, Tensor], list[float]]:
    """(parameter name -> trained values, float32; mean loss of each epoch)."""
    model = copy.deepcopy(backbone.model).float()
    losses = fine_tune(
        backbone, model, examples,
        epochs=config.epochs, batch_size=config.batch_size, learning_rate=config.learning_rate, weight_decay=0.0,
        seed=config.seed, say=say, packing=config.packing,
    )  # fmt: skip
    return {name: p.detach() for name, p in model.named_parameters()}, losses
