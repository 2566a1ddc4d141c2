"""Where a direction is taken out of the residual stream: every block's input, attention output and FFN output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from paving.backbone import Backbone
from paving.backbone.hooks import Edit, edit_module_inputs, edit_outputs
from paving.backbone.writers import block_writers


@contextmanager
def edit_stream(backbone: Backbone, new_edit: Callable[[], Edit]) -> Iterator[None]:
    """While open, x becomes edit(x), (n, t, d_model), at every point of the residual stream (DIM, arXiv 2406.11717).

    new_edit  called once a point, for an Edit of its own: `row_edit` counts the columns that one module has seen. Gradients
              pass through

    Attention and FFN outputs are what is added to the stream: where a block has a norm over them (Gemma 2, Gemma 3, OLMo2),
    what that norm gives. The published code hooks the modules before it; there, what the norm's weights bring back stays
    until the next block. The last block's output has no point of its own: it is the sum of three that have one.

    raises BackboneError for blocks whose outputs cannot be found
    """
    inputs = {block: new_edit() for block in backbone.layers}
    added = [module for block in block_writers(backbone) for module in (block.attention, block.ffn)]
    with edit_module_inputs(inputs), edit_outputs({module: new_edit() for module in added}):
        yield
