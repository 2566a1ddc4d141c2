"""Gradients of the metric at every destination's input, one layer at a time, from the last layer to the first.

A forward pass keeps the residual state before each block and nothing else. Going back, one block at a time is run again
with autograd on, so that the graph of one block exists at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paving.backbone import Backbone
from paving.backbone.attention_parts import BlockParts
from paving.backbone.hooks import BlockCall, edit_module_outputs, edit_residuals, record_calls
from paving.circuit.edges.graph import EdgeGraph
from paving.circuit.edges.metrics import Metrics, measured
from paving.circuit.token_pairs import PairBatch, last_logits


@dataclass(frozen=True)
class InputGradients:
    """Mean gradient over the interpolations at the inputs of neighbouring destinations, (destinations, n, t, d_model)."""

    destinations: range
    values: Tensor


def input_gradients(
    backbone: Backbone,
    graph: EdgeGraph,
    parts: Sequence[BlockParts],
    batch: PairBatch,
    metrics: Metrics,
    steps: int,
    first: int = 0,
) -> Iterator[InputGradients]:
    """Gradients at the inputs of all destinations that read source `first`, latest destinations first.

    The clean prompts are run as steps * n rows, step by step; the caller has opened the edits that tell the steps apart,
    and keeps them open, since each block is run again. A destination's input is the residual stream before its norm.
    """
    ids, mask = batch.clean.repeat(steps, 1), batch.clean_mask.repeat(steps, 1)
    calls, resid_gradient = _forward(backbone, ids, mask, metrics, [*batch.rows] * steps)
    last = graph.logits
    yield InputGradients(range(last, last + 1), _mean(resid_gradient, steps)[None])
    for layer in reversed(range(graph.n_layers)):
        wanted = [d for d in (graph.attention_inputs(layer), _one(graph.ffn_input(layer))) if graph.n_before(d[0]) > first]
        if not wanted:
            return
        call = calls.pop(layer)
        ffn, attention, resid_gradient = _through_block(parts[layer], call, resid_gradient, steps, len(wanted) == 2)
        yield InputGradients(_one(graph.ffn_input(layer)), ffn)
        if attention is not None:
            yield InputGradients(graph.attention_inputs(layer), attention)


def _one(destination: int) -> range:
    return range(destination, destination + 1)


def _mean(gradient: Tensor, steps: int) -> Tensor:
    """(steps * n, t, d) -> (n, t, d)."""
    return gradient.unflatten(0, (steps, -1)).mean(0)


def _forward(
    backbone: Backbone, ids: Tensor, mask: Tensor, metrics: Metrics, rows: Sequence[int]
) -> tuple[dict[int, BlockCall], Tensor]:
    """The calls of all blocks, and the metric's gradient at the last block's output (rows, t, d_model)."""
    leaf: list[Tensor] = []

    def cut(resid: Tensor) -> Tensor:
        leaf.append(resid.detach().requires_grad_())
        return leaf[0]

    # The weights are frozen, so no graph exists below the cut, and blocks are run again one by one for theirs.
    with torch.enable_grad(), record_calls(backbone) as calls, edit_residuals(backbone, {backbone.n_layers - 1: cut}):
        total = measured(metrics, last_logits(backbone, ids, mask), rows).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
    return calls, gradient


def _through_block(
    part: BlockParts, call: BlockCall, resid_gradient: Tensor, steps: int, with_attention: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(FFN input's gradient, gradients of q, k, v inputs by head or group, gradient at the block's input).

    The first two are means over steps, (1 or destinations, n, t, d_model); the last has all rows.
    """
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module):
        def kept(x: Tensor, y: Tensor) -> Tensor:
            # A tensor of its own, even where a norm hands its input on: else the FFN's input would be the whole stream.
            seen[module] = (x, y.view_as(y))
            return seen[module][1]

        return kept

    with torch.enable_grad():
        resid = call.resid.detach().requires_grad_()
        projections = list(dict.fromkeys(r.module for r in part.readers))
        with edit_module_outputs({m: keep(m) for m in (*projections, part.ffn_norm)}):
            out = call.again(resid)
    mid, ffn_normed = seen[part.ffn_norm]
    normed = seen[part.q.module][0]
    at_outputs = [seen[m][1] for m in projections]
    resid_gradient, at_ffn, *deltas = torch.autograd.grad(
        out, [resid, ffn_normed, *at_outputs], resid_gradient, retain_graph=True
    )
    del out
    # From a destination's own normed input back to the residual stream before the norm: every other path is left out,
    # which is what makes it the gradient of one edge's end rather than of the whole state.
    (ffn,) = torch.autograd.grad(ffn_normed, mid, at_ffn, retain_graph=True)
    if not with_attention:
        return _mean(ffn, steps)[None], None, resid_gradient
    delta_of = dict(zip(projections, deltas, strict=True))
    attention = [
        _mean(torch.autograd.grad(normed, resid, delta @ reader.weight(head), retain_graph=True)[0], steps)
        for reader in part.readers
        for head, delta in enumerate(reader.of(delta_of[reader.module]).unbind(-2))
    ]
    return _mean(ffn, steps)[None], torch.stack(attention), resid_gradient
