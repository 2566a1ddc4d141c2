"""Several circuits on one base, merged channel by channel: the arithmetic of a composition, on slices alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from paving.circuit.mask import Mask
from paving.circuit.slices import SliceDelta

Overlap = Literal["largest", "sum", "mean"]


def union(masks: Sequence[Mask]) -> Mask:
    """Every channel that any of the masks selects. All have one reading and one n."""
    layers = sorted({layer for mask in masks for layer in mask.channels})
    channels = {layer: tuple(sorted({c for m in masks for c in m.channels.get(layer, ())})) for layer in layers}
    return Mask(masks[0].reading, masks[0].n, channels)


def positions(within: Mask, of: Mask, layer: int) -> Tensor:
    """(k,) int64: where the channels of `of` stand among those of `within`, which holds them all."""
    return torch.searchsorted(within.index(layer), of.index(layer))


def merged(parts: Sequence[SliceDelta], alphas: Sequence[float], overlap: Overlap) -> SliceDelta:
    """Σ α_i·Δ_i where circuits are disjoint; where they share a channel, what `overlap` says.

    largest  the one α_i·Δ_i with the largest norm on that channel; of equal ones the first
    sum      all of them
    mean     their mean over the circuits that hold the channel

    returns float64 values on the union of the masks, so that nothing is rounded before base and change are added: a
    channel that one circuit alone holds gets the same bits as that circuit's own edit.
    """
    whole = union([part.mask for part in parts])
    values = {}
    for layer, channels in whole.channels.items():
        holders = [(p, a) for p, a in zip(parts, alphas, strict=True) if layer in p.mask.channels]
        width = _by_channel(holders[0][0], layer).shape[1]
        total = torch.zeros(len(channels), width, dtype=torch.float64)
        held = torch.zeros(len(channels))
        # Norms are compared in float32: the order in which a machine adds in float64 must not decide who is larger.
        largest = torch.full((len(channels),), -1.0)
        for part, alpha in holders:
            at, change = positions(whole, part.mask, layer), _by_channel(part, layer) * alpha
            if overlap == "largest":
                norm = change.norm(dim=1).float()
                larger = norm > largest[at]
                at, change, norm = at[larger], change[larger], norm[larger]
                largest[at], total[at] = norm, change
            else:
                total[at] += change
                held[at] += 1
        if overlap == "mean":
            total /= held[:, None]
        values[layer] = total if whole.reading == "outputs" else total.t().contiguous()
    return SliceDelta(whole, values)


def _by_channel(part: SliceDelta, layer: int) -> Tensor:
    """(k, width) float64: one row a channel, whatever the reading."""
    values = part.values[layer].double()
    return values.t() if part.mask.reading == "neurons" else values
