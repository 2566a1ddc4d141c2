"""Which channels of the FFN output projections make up a circuit (C-ΔΘ, stage 1: S(u) -> mask Π)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Reading = Literal["neurons", "outputs"]
Scope = Literal["layer", "global"]
Choice = Literal["top", "bottom", "random"]


class CircuitError(ValueError):
    """A circuit, delta or checkpoint that cannot be used as it is; the message says what, and how to mend it."""


@dataclass(frozen=True)
class Mask:
    """A circuit at component level.

    reading   what a channel is: `neurons`, a column of the FFN output projection (one intermediate neuron), or
              `outputs`, a row (one output coordinate). The paper does not say which.
    n         channels a layer has
    channels  layer -> its chosen channels, sorted; layers without any are left out
    """

    reading: Reading
    n: int
    channels: Mapping[int, tuple[int, ...]]

    def __post_init__(self) -> None:
        for layer, chosen in self.channels.items():
            if list(chosen) != sorted(set(chosen)) or not chosen:
                raise CircuitError(f"channels of layer {layer} must be sorted, without repeats, and at least one.")
            if chosen[0] < 0 or chosen[-1] >= self.n:
                raise CircuitError(
                    f"layer {layer} has channels 0..{self.n - 1}, but the mask names {chosen[0]}..{chosen[-1]}. "
                    "It was made for another model, or for the other reading."
                )

    @property
    def size(self) -> int:
        return sum(map(len, self.channels.values()))

    def index(self, layer: int) -> Tensor:
        """(k,) int64: the channels of one layer."""
        return torch.tensor(self.channels[layer], dtype=torch.long)


def check_told_apart(scores: Mapping[int, Tensor], scope: Scope) -> None:
    """raises CircuitError where scores tell no channel from another: a circuit chosen by them would be any"""
    alike = [layer for layer, s in scores.items() if s.unique().numel() == 1]
    if alike and (scope == "layer" or len(alike) == len(scores)):
        raise CircuitError(
            f"attribution gives every channel of layer {alike[0]} the same score, so there is no circuit to choose there: "
            "the prompts of a pair are the same for this model, or gradients vanish in its dtype. Look at the pairs, or "
            "load it in float32, in another run folder."
        )


def choose(
    scores: Mapping[int, Tensor],
    reading: Reading,
    fraction: float,
    *,
    scope: Scope = "layer",
    choice: Choice = "top",
    seed: int = 0,
) -> Mask:
    """The top (or bottom, or a random) `fraction` of channels by score.

    scores  layer -> (channels,) float; ties go to the lower index
    scope   `layer`: the fraction of every layer (section 3.2, algorithm 1); `global`: of all together (appendix C)
    choice  `bottom` is the paper's inverse circuit; `random` a circuit of the same size drawn with `seed`
    raises  CircuitError if nothing would be chosen
    """
    layers, n = sorted(scores), len(next(iter(scores.values())))
    order = torch.stack([scores[layer].double().cpu() for layer in layers])
    if choice == "random":
        order = torch.rand(order.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if choice == "bottom":
        order = -order
    rows = order if scope == "layer" else order.reshape(1, -1)
    k = round(fraction * rows.shape[1])
    if not 0 < k <= rows.shape[1]:
        raise CircuitError(f"a fraction of {fraction:g} of {rows.shape[1]} channels is {k}; give one in (0, 1].")
    chosen = torch.zeros_like(rows, dtype=torch.bool)
    chosen.scatter_(1, rows.argsort(dim=1, descending=True, stable=True)[:, :k], True)
    by_layer = chosen.reshape(len(layers), n)
    channels = {layer: tuple(row.nonzero().flatten().tolist()) for layer, row in zip(layers, by_layer, strict=True)}
    return Mask(reading, n, {layer: c for layer, c in channels.items() if c})
