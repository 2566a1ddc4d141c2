"""The weights that a mask selects, as tensors of their own: read, written, and put back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from paving.backbone import Backbone, PromptBatch
from paving.backbone.projections import Projection, ffn_outputs
from paving.backbone.weights import edited, tensor_sha256
from paving.circuit.mask import CircuitError, Mask
from paving.intervention import Decided, everywhere


@dataclass(frozen=True)
class SliceDelta:
    """Δθ on the slices of a mask (C-ΔΘ, stage 2): θ+ − θ−, before α.

    values  layer -> (d_model, k) for neurons, (k, d_ff) for outputs, in the base's dtype
    """

    mask: Mask
    values: Mapping[int, Tensor]


def slice_of(weight: Tensor, mask: Mask, layer: int) -> Tensor:
    """A copy of the slice of one projection, (d_model, k) or (k, d_ff). weight: (d_model, d_ff)."""
    return weight.detach().index_select(_dim(mask), mask.index(layer).to(weight.device))


def write_slice(weight: Tensor, mask: Mask, layer: int, values: Tensor) -> None:
    """Write a slice in place into weight (d_model, d_ff), or a view of it. Nothing off the slice is touched."""
    with torch.no_grad():
        weight.index_copy_(_dim(mask), mask.index(layer).to(weight.device), values.to(weight))


def check_fits(projections: Mapping[int, Projection], mask: Mask) -> None:
    """raises CircuitError if the mask was made for another architecture."""
    for layer in mask.channels:
        if layer not in projections:
            raise CircuitError(f"the mask names layer {layer}; this model has layers 0..{len(projections) - 1}.")
        channels = projections[layer].weight.shape[_dim(mask)]
        if channels != mask.n:
            raise CircuitError(
                f"the mask has {mask.n} {mask.reading} a layer, layer {layer} of this model has {channels}. "
                "It was made for another model; find the circuit of this one: paving circuit find"
            )


def off_circuit(backbone: Backbone, mask: Mask) -> dict[str, str]:
    """Every parameter and buffer of the model -> SHA-256 of it, the circuit's channels taken as 0."""
    held = {p.parameter: (layer, p) for layer, p in ffn_outputs(backbone).items() if layer in mask.channels}
    digests = {}
    for name, value in backbone.model.state_dict().items():
        if name in held:
            layer, projection = held[name]
            value = projection.weight.detach().index_fill(_dim(mask), mask.index(layer).to(value.device), 0)
        digests[name] = tensor_sha256(value)
    return digests


def check_off_circuit(backbone: Backbone, mask: Mask, before: Mapping[str, str]) -> None:
    """raises CircuitError if anything outside the circuit is not what it was when `off_circuit` gave `before`"""
    now = off_circuit(backbone, mask)
    moved = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if moved:
        raise CircuitError(
            f"weights outside the circuit have changed: {', '.join(moved[:4])}{' and more' if len(moved) > 4 else ''}. "
            "No delta is made of this; load the base anew."
        )


@dataclass(frozen=True)
class CircuitEdit:
    """θ0 + α·Δθ in memory, as an intervention. The base's own slices are put back when `apply` is left."""

    delta: SliceDelta
    alpha: float
    name: str = "c-delta-theta"

    @contextmanager
    def apply(self, backbone: Backbone, batch: PromptBatch) -> Iterator[Decided]:
        with self.written(backbone):
            yield everywhere(len(batch))

    @contextmanager
    def written(self, backbone: Backbone) -> Iterator[None]:
        """raises CircuitError if the delta does not fit this model."""
        projections, mask = ffn_outputs(backbone), self.delta.mask
        check_fits(projections, mask)
        before = {layer: slice_of(projections[layer].weight, mask, layer) for layer in mask.channels}
        try:
            for layer, base in before.items():
                values = edited(base, self.delta.values[layer], self.alpha)
                write_slice(projections[layer].weight, mask, layer, values)
            yield
        finally:
            for layer, base in before.items():
                write_slice(projections[layer].weight, mask, layer, base)


def _dim(mask: Mask) -> int:
    return 1 if mask.reading == "neurons" else 0
