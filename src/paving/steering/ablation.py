"""Directional ablation at run time: one direction taken out of everything that is written to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from paving.backbone import Backbone, PromptBatch
from paving.steering.checks import SteeringError, check_unit
from paving.steering.row_edits import ablating, row_edit
from paving.steering.stream_points import edit_stream


@dataclass(frozen=True)
class Ablation:
    """x ← x − s (x·r̂) r̂ at every block input, attention output and FFN output, at every position (arXiv 2406.11717).

    unit  r̂, (d_model,) float32 of length 1

    At strength 1 nothing is left of the component, below 1 a part at each of these points (see `edit_stream`).
    """

    unit: Tensor

    def __post_init__(self) -> None:
        check_unit(self.unit, "an ablated direction")

    @contextmanager
    def editing(self, backbone: Backbone, batch: PromptBatch, strength: Tensor) -> Iterator[None]:
        """raises SteeringError for a strength above 1; BackboneError for blocks whose outputs cannot be found"""
        if bool((strength > 1).any()):
            raise SteeringError(
                f"an ablation's strength is {float(strength.max()):g}; it must be from 0 to 1, where nothing is left to "
                "take away. Above 1 the component would come back with the other sign."
            )
        with edit_stream(backbone, lambda: row_edit(ablating(self.unit), strength, batch)):
            yield
