"""Faithfulness: the metric with every edge outside a circuit patched to its corrupt value (Hanna et al., section 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paving.backbone import Backbone
from paving.backbone.attention_parts import BlockParts, HeadReader
from paving.backbone.hooks import edit_module_inputs, edit_module_outputs, edit_residuals
from paving.circuit.edges.circuit import EdgeCircuit
from paving.circuit.edges.graph import EdgeGraph, taken_apart
from paving.circuit.edges.metrics import Metrics, check_metrics, measured
from paving.circuit.edges.nodes import NodeOutputs, difference, recorded
from paving.circuit.mask import CircuitError
from paving.circuit.token_pairs import PairBatch, TokenPair, last_logits, pair_batches


@dataclass(frozen=True)
class Faithfulness:
    """The metric per pair, (n_pairs,) float64: of the circuit, of the clean and of the corrupt run."""

    circuit: Tensor
    clean: Tensor
    corrupt: Tensor

    @property
    def normalised(self) -> float:
        """(m(circuit) - m(corrupt)) / (m(clean) - m(corrupt)) of means over pairs: 1 for the whole graph, 0 without edges.

        It may lie outside 0 to 1. nan where the clean and the corrupt mean are equal: there is nothing to explain.
        """
        span = (self.clean.mean() - self.corrupt.mean()).item()
        return (self.circuit.mean() - self.corrupt.mean()).item() / span if span else math.nan


@torch.no_grad()
def faithfulness(
    backbone: Backbone, pairs: Sequence[TokenPair], circuit: EdgeCircuit, metric: Metrics, *, batch_size: int = 1
) -> Faithfulness:
    """Run the clean prompts with every edge outside the circuit patched.

    The input of a destination v becomes sum_u z_u + sum over u -> v outside the circuit of (z_u^corrupt - z_u), where z_u
    is what u writes in this very run. Prompts of unequal length are aligned at their last tokens; where only one has a
    token, nothing is patched. Exact to rounding, which in bfloat16 can be percents: measure in float32.

    raises CircuitError for an unsupported architecture, or a circuit of another graph
    """
    graph, parts = taken_apart(backbone)
    if graph != circuit.graph:
        raise CircuitError(
            f"the circuit is one of {circuit.graph}; {backbone.name} is {graph}. Find the circuit of this model."
        )
    check_metrics(metric, pairs)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in pair_batches(backbone, pairs, batch_size):
        _, clean = recorded(backbone, parts, batch.clean, batch.clean_mask)
        corrupt_nodes, corrupt = recorded(backbone, parts, batch.corrupt, batch.corrupt_mask)
        inside = patched_logits(backbone, parts, batch, circuit, corrupt_nodes)
        found.append(tuple(measured(metric, x, batch.rows).double().cpu() for x in (inside, clean, corrupt)))
    return Faithfulness(*map(torch.cat, zip(*found, strict=True)))


@torch.no_grad()
def patched_logits(
    backbone: Backbone, parts: Sequence[BlockParts], batch: PairBatch, circuit: EdgeCircuit, corrupt: NodeOutputs
) -> Tensor:
    """(n, vocab) at the last prompt token of the clean prompts inside the circuit."""
    run = _PatchedRun(backbone, parts, batch, circuit, corrupt)
    with ExitStack() as stack:
        # A norm's input is edited for the FFN, whose one destination reads it. Heads have inputs of their own each, so
        # their q, k and v are computed from those, and written over what the projection gave.
        inputs = {backbone.layers[0]: run.embedded, **{p.output: run.heads_wrote for p in parts}}
        inputs |= {p.norm: run.before_attention(p.layer) for p in parts}
        inputs |= {p.ffn_norm: run.before_ffn(p.layer) for p in parts}
        stack.enter_context(edit_module_inputs(inputs))
        outputs = {m: run.projected(p.layer, m) for p in parts for m in {r.module for r in p.readers}}
        outputs |= {p.ffn: run.ffn_wrote for p in parts}
        stack.enter_context(edit_module_outputs(outputs))
        stack.enter_context(edit_residuals(backbone, {backbone.n_layers - 1: run.before_logits}))
        return last_logits(backbone, batch.clean, batch.clean_mask)


class _PatchedRun:
    """One forward pass over one batch, of which each hook below is a step, in the order in which they are called.

    The physical residual stream stays the sum of what the nodes of this run write; only what is read from it is patched.
    """

    def __init__(
        self, backbone: Backbone, parts: Sequence[BlockParts], batch: PairBatch, circuit: EdgeCircuit, corrupt: NodeOutputs
    ) -> None:
        self.graph: EdgeGraph = circuit.graph
        self.parts = parts
        self.shared = batch.shared
        self.corrupt = corrupt
        self.apart: NodeOutputs | None = None
        self.head_inputs: dict[int, Tensor] = {}  # of the layer being run, by destination: (n, t, d_model)
        outside = circuit.graph.edges & ~circuit.mask
        # What a node outside the circuit computes reaches nobody, so its input need not be right.
        for destination in range(circuit.graph.logits):
            if not any(source in circuit.sources for source in circuit.graph.read_by(destination)):
                outside[destination] = False
        self.outside = outside.to(backbone.device)
        self.patched = frozenset(outside.any(1).nonzero().flatten().tolist())

    def embedded(self, resid: Tensor) -> None:
        self.apart = NodeOutputs(difference(self.corrupt.embedding, resid, self.shared))

    def before_attention(self, layer: int):
        here = [d for d in self.graph.attention_inputs(layer) if d in self.patched]

        def seen(resid: Tensor) -> None:
            # Of all heads at once: what earlier nodes wrote is projected once a layer rather than for q, k and v each.
            self.head_inputs = {d: resid + change for d, change in zip(here, self.change(here), strict=True)}

        return seen if here else lambda resid: None

    def projected(self, layer: int, module: nn.Module):
        part = self.parts[layer]
        destinations = iter(self.graph.attention_inputs(layer))
        heads = [(reader, head, next(destinations)) for reader in part.readers for head in range(reader.n_heads)]
        here = [(r, head, d) for r, head, d in heads if r.module is module and d in self.patched]

        def edit(_normed: Tensor, output: Tensor) -> Tensor:
            output = output.clone()
            for reader, head, destination in here:
                reader.of(output)[..., head, :] = _read(part, reader, head, self.head_inputs[destination])
            return output

        return edit if here else lambda _normed, output: None

    def heads_wrote(self, mixed: Tensor) -> None:
        layer = len(self.apart.mixed)
        self.apart.mixed.append(difference(self.corrupt.mixed[layer], mixed, self.shared))

    def before_ffn(self, layer: int):
        return lambda mid: self.with_change(mid, self.graph.ffn_input(layer))

    def ffn_wrote(self, _normed: Tensor, written: Tensor) -> None:
        layer = len(self.apart.ffn)
        self.apart.ffn.append(difference(self.corrupt.ffn[layer], written, self.shared))

    def before_logits(self, resid: Tensor) -> Tensor | None:
        return self.with_change(resid, self.graph.logits)

    def with_change(self, resid: Tensor, destination: int) -> Tensor | None:
        return resid + self.change([destination])[0] if destination in self.patched else None

    def change(self, destinations: list[int]) -> Tensor:
        """(destinations, n, t, d_model): the sum of differences along the edges outside the circuit."""
        resid, outside = self.apart.embedding, self.outside[destinations]
        # Summed in float32: hundreds of differences cancel, and in bfloat16 they would not.
        dtype = torch.promote_types(resid.dtype, torch.float32)
        changes = torch.zeros(len(destinations), resid.numel(), dtype=dtype, device=resid.device)
        for sources, written in self.apart.groups(self.parts, lambda s: bool(outside[:, s.start : s.stop].any())):
            changes += outside[:, sources.start : sources.stop].to(dtype) @ written.flatten(1).to(dtype)
        return changes.unflatten(1, resid.shape).to(resid.dtype)


def _read(part: BlockParts, reader: HeadReader, head: int, resid: Tensor) -> Tensor:
    """(n, t, head_dim): what one head's q, k or v projection makes of the residual state resid (n, t, d_model)."""
    # forward, not the call: a hook of this run stands before the norm, and takes its input for the residual stream.
    return F.linear(part.norm.forward(resid), reader.weight(head), reader.bias(head))
