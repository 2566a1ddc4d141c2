"""Directional ablation at run time: one direction taken out of everything that is written to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from paving.backbone import Backbone, PromptBatch
from paving.backbone.hooks import edit_module_inputs, edit_outputs
from paving.backbone.writers import block_writers
from paving.steering.checks import SteeringError, check_unit
from paving.steering.row_edits import ablating, row_edit


@dataclass(frozen=True)
class Ablation:
    """x ← x − s (x·r̂) r̂ at every block input, attention output and FFN output, at every position (arXiv 2406.11717).

    unit  r̂, (d_model,) float32 of length 1

    At strength 1 nothing is left of the component, below 1 a part at each of these points. Attention and FFN outputs are
    what is added to the stream: where a block has a norm over them (Gemma 2, Gemma 3, OLMo2), what that norm gives. The
    published code hooks the modules before it; there, what the norm's weights bring back along r̂ stays until the next block.
    """

    unit: Tensor

    strengths = (0.5, 1.0)  # that are worth a sweep

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
        # One edit a module: each counts the columns that its module has seen.
        blocks = {block: row_edit(ablating(self.unit), strength, batch) for block in backbone.layers}
        added = [module for block in block_writers(backbone) for module in (block.attention, block.ffn)]
        outputs = {module: row_edit(ablating(self.unit), strength, batch) for module in added}
        with edit_module_inputs(blocks), edit_outputs(outputs):
            yield
