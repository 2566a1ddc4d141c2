"""Circuit-restricted weight arithmetic (C-ΔΘ, stage 2): θ+ and θ− on the slices of a mask, Δθ = θ+ − θ−."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from paving.backbone import Backbone
from paving.backbone.hooks import edit_module_outputs
from paving.backbone.projections import Projection, ffn_outputs
from paving.circuit.mask import CircuitError, Mask
from paving.circuit.pairs import Pair
from paving.circuit.slices import SliceDelta, check_fits
from paving.traces.top_k import TopK, top_k
from paving.training.opening_examples import Example, opening_examples
from paving.training.openings import Openings
from paving.training.packing import answer_cross_entropy, answer_logits, check_packing, check_window

Watch = Callable[[str, int, int, dict[str, float]], None]
Side = Literal["refusal", "compliance"]
T = TypeVar("T")
K = 256  # of 49152 tokens; enough for KL on the base's own answers, and a row takes kilobytes instead of megabytes


class ArithmeticConfig(BaseModel):
    """Stage 2. The defaults are the paper's; what is off by default goes beyond it.

    retain         `ce`: benign prompts keep the base's own answers by cross-entropy; `kl`: by KL(base ‖ edited) on the
                   base's 256 likeliest tokens
    retain_weight  of that term against the opening's cross-entropy
    minus          False leaves θ− out: Δθ = θ+ − θ0
    packing        a step's rows in one sequence, their shared opening read once; the same loss in less time
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(8, ge=1)
    batch_size: int = Field(8, ge=1)
    learning_rate: float = Field(1e-5, gt=0)
    retain: Literal["none", "ce", "kl"] = "none"
    retain_weight: float = Field(1.0, gt=0)
    minus: bool = True
    packing: bool = True
    seed: int = 0


def weight_delta(
    backbone: Backbone,
    pairs: Sequence[Pair],
    mask: Mask,
    openings: Openings,
    config: ArithmeticConfig,
    *,
    own: Sequence[Example] = (),
    watch: Watch | None = None,
) -> SliceDelta:
    """Δθ on the slices of `mask`, in the base's dtype. θ− lives in memory only; the base is not written to.

    own   the base's own answers to benign prompts, for the retain term
    raises CircuitError for a mask of another model, no pairs, or a retain term without answers
    """
    if not pairs:
        raise CircuitError("no pairs to fine-tune on; give pairs of the category.")
    if config.retain != "none" and not own:
        raise CircuitError(f"retain={config.retain!r} needs the base's own answers to benign prompts; there are none.")
    texts = [p.harmful for p in pairs]
    plus = fine_tuned(backbone, texts, mask, "refusal", openings, config, own, watch)
    if not config.minus:
        return SliceDelta(mask, {layer: change.to(backbone.dtype) for layer, change in plus.items()})
    minus = fine_tuned(backbone, texts, mask, "compliance", openings, config, own, watch)
    return SliceDelta(mask, {layer: (plus[layer] - minus[layer]).to(backbone.dtype) for layer in plus})


def fine_tuned(
    backbone: Backbone,
    texts: Sequence[str],
    mask: Mask,
    side: Side,
    openings: Openings,
    config: ArithmeticConfig,
    own: Sequence[Example] = (),
    watch: Watch | None = None,
) -> dict[int, Tensor]:
    """θ± − θ0 on the slices, layer -> float32 of the slice's shape: cross-entropy on openings given harmful prompts.

    Parameters, gradients and Adam's state exist for the slices alone: the base's matrices are read, never written, so
    that nothing off the mask can move. Adam does not decay weights and sees only gradients: fine-tuning the change
    from zero is fine-tuning the slice itself.
    raises FloatingPointError if the loss is not finite
    """
    projections = ffn_outputs(backbone)
    check_fits(projections, mask)
    changes = {layer: nn.Parameter(_zeros(projections[layer], mask, layer)) for layer in mask.channels}
    optimiser = torch.optim.Adam(changes.values(), lr=config.learning_rate, fused=True)
    phrases = openings.refusal if side == "refusal" else openings.compliance
    rng = random.Random(config.seed)
    kept = _endless(_with_base(backbone, own, config), rng)
    for epoch in range(config.epochs):
        rows = _shuffled(opening_examples(backbone, texts, phrases, seed=config.seed, epoch=epoch), rng)
        batches = [rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)]
        if config.packing:
            check_window(backbone, (*rows, *own))
            if epoch == 0:
                check_packing(backbone, batches[0])
        for step, batch in enumerate(batches, 1):
            kept_rows = [next(kept) for _ in batch] if config.retain != "none" else []
            with changed(projections, mask, changes):
                terms = _terms(backbone, batch, kept_rows, config)
            loss = terms["ce"] + config.retain_weight * terms.get("retain", 0.0)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"loss is {loss.item()} in epoch {epoch + 1}; lower the learning rate.")
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if watch is not None:
                name = f"{side} epoch {epoch + 1}/{config.epochs}"
                watch(name, step, len(batches), {k: v.item() for k, v in terms.items()})
    return {layer: change.detach() for layer, change in changes.items()}


@contextmanager
def changed(projections: Mapping[int, Projection], mask: Mask, changes: Mapping[int, Tensor]) -> Iterator[None]:
    """While open, every projection answers as with its slice changed: one product more, the width of the slice."""

    def edit_for(layer: int):
        index = mask.index(layer).to(projections[layer].weight.device)

        def neurons(x: Tensor, y: Tensor) -> Tensor:
            return y + x.index_select(-1, index) @ changes[layer].to(x.dtype).t()

        def outputs(x: Tensor, y: Tensor) -> Tensor:
            return y.index_add(-1, index, x @ changes[layer].to(x.dtype).t())

        return neurons if mask.reading == "neurons" else outputs

    with edit_module_outputs({projections[layer].module: edit_for(layer) for layer in changes}):
        yield


class Own(NamedTuple):
    """The base's answer to a benign prompt, and for KL its distributions there, (tokens, k)."""

    row: Example
    base: TopK | None


@torch.no_grad()
def _with_base(backbone: Backbone, own: Sequence[Example], config: ArithmeticConfig) -> list[Own]:
    """Once, before anything has changed, instead of a pass of the base in every step."""
    if config.retain != "kl":
        return [Own(row, None) for row in own]
    return [Own(row, top_k(answer_logits(backbone, [row], packing=config.packing)[0], K)) for row in own]


def _terms(backbone: Backbone, batch: Sequence[Example], own: Sequence[Own], config: ArithmeticConfig) -> dict[str, Tensor]:
    """`ce` of the openings, and `retain`: cross-entropy of the base's own answers, or KL(base ‖ edited) on them. Means
    over tokens, in nats. Two packed passes, not one: attention costs the square of a sequence's length."""
    terms = {"ce": answer_cross_entropy(backbone, batch, packing=config.packing)}
    rows = [o.row for o in own]
    if own and config.retain == "ce":
        terms["retain"] = answer_cross_entropy(backbone, rows, packing=config.packing)
    elif own:
        logits, _ = answer_logits(backbone, rows, packing=config.packing)
        log_p = torch.cat([o.base.log_probs for o in own])
        log_q = logits.gather(-1, torch.cat([o.base.ids for o in own])).float().log_softmax(-1)
        terms["retain"] = nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return terms


def _shuffled(rows: Sequence[T], rng: random.Random) -> list[T]:
    return rng.sample(rows, len(rows))


def _endless(rows: Sequence[T], rng: random.Random) -> Iterator[T]:
    while rows:
        yield from _shuffled(rows, rng)


def _zeros(projection: Projection, mask: Mask, layer: int) -> Tensor:
    d_model, d_ff = projection.weight.shape
    k = len(mask.channels[layer])
    shape = (d_model, k) if mask.reading == "neurons" else (k, d_ff)
    return torch.zeros(shape, device=projection.weight.device)
