"""Activation addition: one vector added to the residual stream at one layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from paving.backbone import Backbone, PromptBatch
from paving.backbone.hooks import edit_residuals
from paving.steering.row_edits import Positions, adding, row_edit


@dataclass(frozen=True)
class Addition:
    """x ← x + s · v at the output of one block, which is the input of the next.

    vector     v, (d_model,) float32, with its own length
    layer      the block whose output is edited
    positions  `all`: the whole prompt and the answer; `answer`: from the last prompt token on
    """

    vector: Tensor
    layer: int
    positions: Positions = "all"

    @contextmanager
    def editing(self, backbone: Backbone, batch: PromptBatch, strength: Tensor) -> Iterator[None]:
        """raises BackboneError for a layer that does not exist"""
        backbone.check_layers((self.layer,), "addition")
        with edit_residuals(backbone, {self.layer: row_edit(adding(self.vector), strength, batch, self.positions)}):
            yield
