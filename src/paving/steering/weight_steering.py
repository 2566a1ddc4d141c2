"""WS: contrastive weight steering, the difference of two fine-tunes added to the base (arXiv 2511.05408)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from paving.backbone import Backbone, PromptBatch
from paving.backbone.weights import edited
from paving.intervention import Decided, everywhere
from paving.steering.checks import SteeringError, check_base, check_strength
from paving.steering.weight_delta import WeightDelta
from paving.training.fine_tune import Say, fine_tune
from paving.training.opening_examples import opening_examples
from paving.training.openings import Openings


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
    check_floats(backbone)
    refusing, refusal_losses = _fine_tuned(backbone, prompts, openings.refusal, config, lambda s: say(f"refusal: {s}"))
    complying, losses = _fine_tuned(backbone, prompts, openings.compliance, config, lambda s: say(f"compliance: {s}"))
    dtypes = {name: p.dtype for name, p in backbone.model.named_parameters()}
    with torch.no_grad():
        values = {name: (refusing.pop(name) - complying.pop(name)).to(dtype) for name, dtype in dtypes.items()}
    both = {"refusal": tuple(refusal_losses), "compliance": tuple(losses)}
    return WeightDelta(values, backbone.name, backbone.fingerprint, both)


def check_floats(backbone: Backbone) -> None:
    other = [f"{n} ({p.dtype})" for n, p in backbone.model.named_parameters() if not p.dtype.is_floating_point]
    if other or getattr(backbone.model, "quantization_method", None):
        raise SteeringError(
            f"{backbone.name} has quantised weights ({', '.join(other[:2]) or 'by its configuration'}), which cannot be "
            "fine-tuned and put back bit for bit. Load the unquantised checkpoint."
        )


def _fine_tuned(
    backbone: Backbone, prompts: Sequence[str], phrases: Sequence[str], config: WeightSteeringConfig, say: Say
) -> tuple[dict[str, Tensor], list[float]]:
    """(parameter name -> trained values, float32; mean loss of each epoch)."""
    model = copy.deepcopy(backbone.model).float()
    losses = fine_tune(
        backbone, model, lambda epoch: opening_examples(backbone, prompts, phrases, seed=config.seed, epoch=epoch),
        epochs=config.epochs, batch_size=config.batch_size, learning_rate=config.learning_rate, weight_decay=0.0,
        seed=config.seed, say=say, packing=config.packing,
    )  # fmt: skip
    return {name: p.detach() for name, p in model.named_parameters()}, losses
