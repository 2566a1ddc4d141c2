"""The only file that registers hooks: record residual states, edit residual states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from paving.backbone.load import Backbone

Edit = Callable[[Tensor], Tensor | None]


def _resid(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def edit_residuals(backbone: Backbone, edits: Mapping[int, Edit]) -> Iterator[None]:
    """While open, the output of layer l becomes edits[l](resid), or stays as it is where that returns None.

    resid: (n, positions, d_model), the output of the block. Leaving the context removes every hook, also on an error.
    """
    with edit_outputs({backbone.layers[layer]: edit for layer, edit in edits.items()}):
        yield


@contextmanager
def edit_outputs(edits: Mapping[nn.Module, Edit]) -> Iterator[None]:
    """While open, the output of each module (a tuple's first) becomes edits[module](output), or stays where that is None."""

    def hook_for(edit: Edit):
        def hook(_module, _inputs, output):
            edited = edit(_resid(output))
            if edited is None:  # None rather than an equal tensor: the base's own tensor goes on, bit for bit
                return None
            return edited if isinstance(output, Tensor) else (edited, *output[1:])

        return hook

    handles = []
    try:
        for module, edit in edits.items():
            # First in line, so that recorders (ours, and those transformers installs for output_hidden_states) see
            # the edited state. Without prepend the logits would be edited and the recorded states would not.
            handles.append(module.register_forward_hook(hook_for(edit), prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_residuals(
    backbone: Backbone, layers: Sequence[int], keep: Callable[[Tensor], Tensor] = lambda resid: resid
) -> Iterator[dict[int, Tensor]]:
    """While open, the (edited) output of each listed layer is kept, per layer the latest forward pass.

    keep: what to retain of resid (n, positions, d_model); by default all of it, attached to its graph.
    """
    seen: dict[int, Tensor] = {}

    def hook_for(layer: int):
        def hook(_module, _inputs, output):
            seen[layer] = keep(_resid(output))

        return hook

    handles = []
    try:
        for layer in layers:
            handles.append(backbone.layers[layer].register_forward_hook(hook_for(layer)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def edit_module_inputs(edits: Mapping[nn.Module, Edit]) -> Iterator[None]:
    """While open, the first positional input x of each module becomes edits[module](x), or stays where that is None."""

    def hook_for(edit: Edit):
        def hook(_module, inputs):
            edited = edit(inputs[0])
            return None if edited is None else (edited, *inputs[1:])

        return hook

    handles = []
    try:
        for module, edit in edits.items():
            handles.append(module.register_forward_pre_hook(hook_for(edit)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def edit_module_outputs(edits: Mapping[nn.Module, Callable[[Tensor, Tensor], Tensor | None]]) -> Iterator[None]:
    """While open, the output y of each module becomes edits[module](x, y), or stays where that is None; x: its input."""

    def hook_for(edit: Callable[[Tensor, Tensor], Tensor | None]):
        return lambda _module, inputs, output: edit(inputs[0], output)

    handles = []
    try:
        for module, edit in edits.items():
            handles.append(module.register_forward_hook(hook_for(edit)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class BlockCall:
    """How the model called one block, enough to call it again: block(resid, *args, **kwargs). resid: (n, t, d_model)."""

    block: nn.Module
    resid: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def again(self, resid: Tensor) -> Tensor:
        """The block's output (n, t, d_model) for another resid, with the masks and positions of the recorded call."""
        # forward, not the call: the block's own hooks have had their say on the recorded resid already.
        return _resid(self.block.forward(resid, *self.args, **self.kwargs))


@contextmanager
def record_calls(backbone: Backbone) -> Iterator[dict[int, BlockCall]]:
    """While open, the latest call of every block is kept, by layer. Masks and positions are shared, not copied."""
    seen: dict[int, BlockCall] = {}

    def hook_for(layer: int):
        def hook(module, args, kwargs):
            seen[layer] = BlockCall(module, args[0], args[1:], kwargs)

        return hook

    handles = []
    try:
        for layer, block in enumerate(backbone.layers):
            handles.append(block.register_forward_pre_hook(hook_for(layer), with_kwargs=True))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


Before = Callable[[Mapping[str, Any]], None]
After = Callable[[Mapping[str, Any], Any], Any | None]


@contextmanager
def around_passes(backbone: Backbone, before: Before, after: After) -> Iterator[None]:
    """While open, before(arguments) is called ahead of every pass through the blocks, and the pass's output becomes
    after(arguments, output), or stays as it is where that returns None.

    arguments: by name, as transformers calls its decoder
    """
    decoder = backbone.model.get_decoder()
    handles = []
    try:
        handles.append(
            decoder.register_forward_pre_hook(lambda _module, _args, arguments: before(arguments), with_kwargs=True)
        )
        handles.append(
            decoder.register_forward_hook(
                lambda _module, _args, arguments, output: after(arguments, output), with_kwargs=True, prepend=True
            )
        )
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def contiguous_head_input(backbone: Backbone) -> Iterator[None]:
    """While open, the language-model head reads a contiguous tensor.

    At prefill transformers hands it a strided view of the last position. On CPUs torch then multiplies by a copy of
    the vocabulary matrix for every row of the batch: seconds and gigabytes for a few dozen rows.
    """
    head = backbone.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _module, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def behind_blocks(blocks: Mapping[int, nn.Module], then: Callable[[int, Any], None]) -> None:
    """For good: `then(layer, output)` behind every pass of each block, its output as the block returns it.

    For a model that is an engine's own and is edited for as long as it lives; elsewhere a context manager restores it.
    """

    def hook_for(layer: int):
        def hook(_module, _inputs, output):
            then(layer, output)

        return hook

    for layer, block in blocks.items():
        block.register_forward_hook(hook_for(layer))
