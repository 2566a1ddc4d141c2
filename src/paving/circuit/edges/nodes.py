"""What every node writes, kept small: heads before their output projection, two vectors a token and layer in all.

The record of t tokens is (2 n_layers + 1) * t vectors of about d_model numbers. One vector a head, as in
(n, t, n_sources, d_model), would be n_heads times that; heads are projected layer by layer, where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paving.backbone import Backbone
from paving.backbone.attention_parts import SUPPORTED, BlockParts
from paving.backbone.hooks import edit_module_inputs, edit_module_outputs, edit_residuals
from paving.circuit.mask import CircuitError
from paving.circuit.token_pairs import last_logits

ROUNDING = 1e-3  # relative; what is summed here in the model's own order and dtype differs far less where the sum is right


@dataclass
class NodeOutputs:
    """Outputs, or differences of outputs, of all sources over one batch; the lists grow as layers are run.

    embedding  (n, t, d_model), what the first block reads: token and any learned position embedding
    mixed      per layer (n, t, n_heads * head_dim), the heads' values before their output projection
    ffn        per layer (n, t, d_model)
    """

    embedding: Tensor
    mixed: list[Tensor] = field(default_factory=list)
    ffn: list[Tensor] = field(default_factory=list)

    def groups(
        self, parts: Sequence[BlockParts], wanted: Callable[[range], bool] = lambda sources: True
    ) -> Iterator[tuple[range, Tensor]]:
        """Wanted sources in order, one layer's heads or one FFN at a time: (their indices, (sources, n, t, d_model))."""
        stop = 0

        def following(count: int) -> range:
            nonlocal stop
            stop += count
            return range(stop - count, stop)

        if wanted(sources := following(1)):
            yield sources, self.embedding[None]
        for layer, mixed in enumerate(self.mixed):
            if wanted(sources := following(parts[layer].q.n_heads)):
                yield sources, parts[layer].heads_written(mixed)
            if layer < len(self.ffn) and wanted(sources := following(1)):  # not there yet while this layer is being run
                yield sources, self.ffn[layer][None]


def difference(corrupt: Tensor, clean: Tensor, shared: Tensor) -> Tensor:
    """corrupt - clean where both prompts have a token, else 0. All (n, t, width), shared (n, t, 1) bool."""
    # Subtracted in float32: of two nearly equal bfloat16 numbers little would be left.
    apart = (corrupt.float() - clean.float()).to(clean.dtype) if clean.dtype != torch.float64 else corrupt - clean
    return torch.where(shared, apart, torch.zeros_like(apart))


def differences(corrupt: NodeOutputs, clean: NodeOutputs, shared: Tensor) -> NodeOutputs:
    """Of every source: z_corrupt - z_clean."""

    def each(ours: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
        return [difference(a, b, shared) for a, b in zip(ours, theirs, strict=True)]

    return NodeOutputs(
        difference(corrupt.embedding, clean.embedding, shared),
        each(corrupt.mixed, clean.mixed),
        each(corrupt.ffn, clean.ffn),
    )


@torch.no_grad()
def recorded(backbone: Backbone, parts: Sequence[BlockParts], ids: Tensor, mask: Tensor) -> tuple[NodeOutputs, Tensor]:
    """(outputs of every source, logits (n, vocab)) of an unpatched run.

    raises CircuitError if the residual stream is not the sum of what the nodes write
    """
    with recording(backbone, parts) as nodes, summed(backbone, parts):
        logits = last_logits(backbone, ids, mask)
    return nodes[0], logits


@contextmanager
def recording(backbone: Backbone, parts: Sequence[BlockParts]) -> Iterator[list[NodeOutputs]]:
    """While open, one forward pass leaves its node outputs in the list."""
    kept: list[NodeOutputs] = []

    # The base's own tensors go on: every function here returns None.
    def heads(mixed: Tensor) -> None:
        kept[-1].mixed.append(mixed)

    inputs = {backbone.layers[0]: lambda resid: kept.append(NodeOutputs(resid)), **{p.output: heads for p in parts}}
    outputs = {p.ffn: lambda _x, y: kept[-1].ffn.append(y) for p in parts}
    with edit_module_inputs(inputs), edit_module_outputs(outputs):
        yield kept


@contextmanager
def summed(backbone: Backbone, parts: Sequence[BlockParts]) -> Iterator[None]:
    """While open, every norm's input and every block's output is compared with the sum of what was written before it.

    That is what edges rest on, and what an architecture that normalises or scales its blocks' outputs, or runs
    attention and FFN in parallel, breaks. One running sum is held.
    """
    total: list[Tensor] = []

    def starts(resid: Tensor) -> None:
        total[:] = [resid]

    def written(_x: Tensor, y: Tensor) -> None:
        total[0] = total[0] + y

    def compare(part: BlockParts, where: str):
        def compared(resid: Tensor) -> None:
            if not (resid - total[0]).norm() <= ROUNDING * total[0].norm():
                raise CircuitError(
                    f"{where} layer {part.layer} of {backbone.name} the residual stream is not the sum of what heads and "
                    f"FFNs wrote, so its edges cannot be told apart. {SUPPORTED}"
                )

        return compared

    with ExitStack() as stack:
        stack.enter_context(edit_module_inputs({backbone.layers[0]: starts}))
        before = {p.norm: compare(p, "before the attention of") for p in parts}
        before |= {p.ffn_norm: compare(p, "before the FFN of") for p in parts}
        stack.enter_context(edit_module_inputs(before))
        stack.enter_context(edit_module_outputs({m: written for p in parts for m in (p.output, p.ffn)}))
        stack.enter_context(edit_residuals(backbone, {p.layer: compare(p, "after") for p in parts}))
        yield
