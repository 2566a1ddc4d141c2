"""Directional ablation as weights: everything that writes to the residual stream is made orthogonal to one direction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paving.backbone import Backbone, PromptBatch
from paving.backbone.writers import StreamTensor, stream_tensors
from paving.steering.checks import SteeringError, check_unit
from paving.steering.row_edits import ablating


@dataclass(frozen=True)
class Orthogonal:
    """W ← W − r̂ r̂ᵀ W for every matrix that writes to the stream, b ← b − (b·r̂) r̂ for its bias (arXiv 2406.11717).

    unit  r̂, (d_model,) float32 of length 1

    In memory, while the context is open: embeddings (GPT-2's positions, too), attention and FFN output projections. The same
    function as `Ablation` at strength 1, up to rounding. Takes as much memory again as these matrices.
    """

    unit: Tensor

    def __post_init__(self) -> None:
        check_unit(self.unit, "the direction of an orthogonalisation")

    @contextmanager
    def editing(self, backbone: Backbone, batch: PromptBatch, strength: Tensor) -> Iterator[None]:
        """raises SteeringError unless every row's strength is 1; BackboneError where weights cannot do it, saying why"""
        if not bool((strength == 1).all()):
            raise SteeringError(
                f"weights are the same for every row of a batch, but the strengths here are {strength.tolist()}. Edit all "
                "rows at strength 1 (global routing), or use `Ablation`, which decides row by row."
            )
        # Other Parameter objects rather than other values in the same ones: a language-model head tied to the embedding
        # reads the stream and keeps its matrix, and what is put back is the very object that was there.
        before: list[tuple[StreamTensor, nn.Parameter]] = []
        try:
            for tensor in stream_tensors(backbone):
                stored = getattr(tensor.module, tensor.name)
                before.append((tensor, stored))
                projected = orthogonalised(stored, self.unit, tensor.axis)
                setattr(tensor.module, tensor.name, nn.Parameter(projected, requires_grad=False))
            yield
        finally:
            for tensor, stored in reversed(before):
                setattr(tensor.module, tensor.name, stored)


@torch.no_grad()
def orthogonalised(stored: Tensor, unit: Tensor, axis: int) -> Tensor:
    """`stored` in its own dtype, without the component along unit (d_model,) of the vectors along `axis`."""
    vectors = stored.float().movedim(axis, -1)
    return (vectors + ablating(unit)(vectors)).movedim(-1, axis).to(stored.dtype).contiguous()
