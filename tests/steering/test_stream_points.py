"""The points at which a direction is taken out of the residual stream."""

from __future__ import annotations

import pytest
import torch

from paving.backbone import render_batch
from paving.backbone.hooks import edit_module_inputs, edit_outputs, record_residuals
from paving.backbone.writers import block_writers
from paving.steering.stream_points import edit_stream
from tiny_models import ARCHITECTURES, logits_of, some_prompts, tiny_backbone


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "olmo2", "gpt2"])
def test_what_the_writers_write_is_all_that_a_block_adds(architecture):
    """Else an ablation would miss a part: block output = block input + both writers' outputs."""
    backbone = tiny_backbone(architecture)
    batch = render_batch(backbone, some_prompts()[:3])
    inputs, written = [], []
    writers = [m for block in block_writers(backbone) for m in (block.attention, block.ffn)]
    with (
        edit_module_inputs({b: lambda x: inputs.append(x) for b in backbone.layers}),
        edit_outputs({w: lambda y: written.append(y) for w in writers}),
        record_residuals(backbone, range(backbone.n_layers)) as outputs,
    ):
        logits_of(backbone, batch)
    for layer in range(backbone.n_layers):
        torch.testing.assert_close(inputs[layer] + written[2 * layer] + written[2 * layer + 1], outputs[layer])


def test_every_point_gets_an_edit_of_its_own():
    backbone = tiny_backbone()
    made = []
    with edit_stream(backbone, lambda: made.append(1) or (lambda x: None)):
        assert len(made) == 3 * backbone.n_layers
