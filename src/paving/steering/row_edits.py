"""One change to the residual stream, made to some rows of a batch, each at its own strength."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from paving.backbone import PromptBatch
from paving.backbone.hooks import Edit

Positions = Literal["all", "answer"]
Change = Callable[[Tensor], Tensor]
"""(m, t, d_model) float32 -> what is added at strength 1, of the same shape or broadcast to it."""


def row_edit(change: Change, strength: Tensor, batch: PromptBatch, positions: Positions = "all") -> Edit:
    """resid ← resid + strength · change(resid), for `edit_residuals` and its kin, of one batch from its first pass on.

    strength   (n,) float32; rows at 0 keep the base's bits, and a pass that edits none returns the base's own tensor
    positions  `all`: the whole prompt and the answer; `answer`: from the last prompt token on, where Residual Paving edits

    The change is computed in float32 and added in the stream's dtype. One call serves one module: it counts the columns
    that this module has seen in earlier passes.
    """
    begin = 0 if positions == "all" else batch.width - 1
    columns = 0

    def edit(resid: Tensor) -> Tensor | None:
        nonlocal columns
        first = max(0, begin - columns)
        columns += resid.shape[1]
        each = strength.to(resid.device).repeat_interleave(len(resid) // len(strength))  # samples follow their prompt's row
        rows = each.nonzero().squeeze(-1)
        if first >= resid.shape[1] or not len(rows):
            return None
        part = resid[rows, first:]
        edited = resid.clone()  # rows that are not chosen keep the base's bits
        edited[rows, first:] = part + (change(part.float()) * each[rows, None, None]).to(resid.dtype)
        return edited

    return edit


def adding(vector: Tensor) -> Change:
    """x + v. vector: (d_model,) float32."""
    return lambda x: vector.to(x.device)


def ablating(unit: Tensor, level: float = 0.0) -> Change:
    """x − (x·r̂) r̂ + c r̂: the component along r̂ becomes `level` (0: it is gone). unit: (d_model,) float32 of length 1."""
    return lambda x: (level - x @ unit.to(x.device)).unsqueeze(-1) * unit.to(x.device)
