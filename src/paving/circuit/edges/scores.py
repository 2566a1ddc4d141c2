"""Scores of all edges: EAP, EAP-IG over input embeddings, EAP-IG over activations (Hanna et al., arXiv 2403.17806).

Cost of one pair of t tokens, in forward passes of the model (2 * weights * t operations), m steps, L layers:

    operations   eap, eap-ig-inputs    2 + 3 m      clean and corrupt; per step a forward pass, each block once again, and
                                                    back through it (weights are frozen: no gradient of theirs)
                 eap-ig-activations    2 + 2 m (2 L + 1), about: the passes below the interpolated node are not gone back
                 and (L ** 2 / 2) * 2 d_model ** 2 t for projecting the heads of each layer once per later layer, and
                 2 t d_model a edge for the products themselves: together about L / 24 passes, whatever m is
    bytes        the weights, once a pass and batch

Memory beside the model, in vectors of d_model numbers a token of the batch; first the records, then the gradients:

    clean and corrupt record, their difference   3 (2 L + 1)
    the difference, states before each block     (2 L + 1) + m L
    one block with its graph                     about m (2 n_heads * head_dim + 3 d_ff) / d_model + 10 m
    one layer's destinations and sources         (n_heads + 2 n_kv_heads) + n_heads

so it is flat in pairs, and a layer adds max(6, 2 + m) vectors; no term has sources times layers in it, where one tensor
(n, t, n_sources, d_model) would be L (n_heads + 1) of them. Scores take one number an edge and pair of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from paving.backbone import Backbone
from paving.backbone.attention_parts import BlockParts
from paving.backbone.hooks import edit_module_inputs, edit_module_outputs
from paving.circuit.edges.gradients import InputGradients, input_gradients
from paving.circuit.edges.graph import EdgeGraph, taken_apart
from paving.circuit.edges.metrics import Metrics, check_metrics
from paving.circuit.edges.nodes import NodeOutputs, differences, recorded
from paving.circuit.mask import CircuitError
from paving.circuit.token_pairs import PairBatch, TokenPair, pair_batches

Method = Literal["eap", "eap-ig-inputs", "eap-ig-activations"]
METHODS = ("eap", "eap-ig-inputs", "eap-ig-activations")


@dataclass(frozen=True)
class EdgeScores:
    """Scores of every edge of a graph, over pairs.

    mean           (n_destinations, n_sources) float64, mean of the signed scores; nan where there is no edge
    mean_absolute  the same of the absolute scores, as C-ΔΘ's S(u) has it
    """

    graph: EdgeGraph
    mean: Tensor
    mean_absolute: Tensor
    n_pairs: int


def edge_scores(
    backbone: Backbone,
    pairs: Sequence[TokenPair],
    metric: Metrics,
    *,
    method: Method = "eap-ig-inputs",
    steps: int = 5,
    batch_size: int = 1,
    progress: Callable[[int], None] = lambda n_pairs: None,
) -> EdgeScores:
    """Scores of all edges, averaged over pairs. See `pair_scores` for what a score is.

    metric    from logits at the last prompt token, (rows, vocab), to one number a row; or one such function a pair. It
              is called with rows of all interpolations, in the order of pairs within a step
    steps     interpolations m; EAP has one
    progress  called with the number of pairs scored so far
    raises    CircuitError for an unsupported architecture, pairs that do not fit, or scores that are not finite
    """
    graph, parts = taken_apart(backbone)
    check_metrics(metric, pairs)
    mean = torch.zeros(graph.n_destinations, graph.n_sources, dtype=torch.float64)
    mean_absolute = mean.clone()
    for batch in pair_batches(backbone, pairs, batch_size):
        scores = pair_scores(backbone, graph, parts, batch, metric, method, steps).double()
        if not scores.isfinite().all():
            bad = [pairs[row].id for row, s in zip(batch.rows, scores, strict=True) if not s.isfinite().all()]
            raise CircuitError(f"scores of {', '.join(bad)} are not finite in {backbone.dtype}. Load the model in float32.")
        mean += scores.sum(0) / len(pairs)
        mean_absolute += scores.abs().sum(0) / len(pairs)
        progress(batch.rows.stop)
    off = ~graph.edges
    return EdgeScores(graph, mean.masked_fill(off, math.nan), mean_absolute.masked_fill(off, math.nan), len(pairs))


def pair_scores(
    backbone: Backbone,
    graph: EdgeGraph,
    parts: Sequence[BlockParts],
    batch: PairBatch,
    metric: Metrics,
    method: Method = "eap-ig-inputs",
    steps: int = 5,
) -> Tensor:
    """Scores of every edge for every pair, (n, n_destinations, n_sources) float32 or more, 0 where there is no edge.

    score(u -> v) = sum over positions of (z_u^corrupt - z_u^clean) · mean over steps of dM/d(input of v)

    the first-order change of the metric M when edge u -> v alone is patched to its corrupt value; positive where patching
    raises M. The gradient is taken at

    eap                 the clean prompt
    eap-ig-inputs       the clean prompt with embeddings e_corrupt + k/m (e_clean - e_corrupt), k = 1..m, equation 3 of
                        Hanna et al.; m = 1 is EAP. (Their code has stepped from k = 0 to m - 1 at times.)
    eap-ig-activations  the clean prompt with z_u interpolated in the same way and everything after it computed: one set of
                        runs for each layer's heads (interpolated together, as in their code) and each FFN. A score uses
                        the runs that interpolate its own source; their code averages over the runs of all sources.

    Clean is the harmful prompt of a pair, corrupt the benign one. Prompts of unequal length are aligned at their last
    tokens: `PairBatch.shared`. Gradients of padding are zero, and so are differences there.
    """
    if method not in METHODS or steps < 1:
        allowed = ", ".join(METHODS)
        raise CircuitError(f"method {method!r} with {steps} steps is not known; give one of {allowed}, and steps >= 1.")
    steps = 1 if method == "eap" else steps
    clean, _ = recorded(backbone, parts, batch.clean, batch.clean_mask)
    corrupt, _ = recorded(backbone, parts, batch.corrupt, batch.corrupt_mask)
    apart = differences(corrupt, clean, batch.shared)
    del clean, corrupt
    dtype = torch.promote_types(backbone.dtype, torch.float32)
    scores = torch.zeros(len(batch.rows), graph.n_destinations, graph.n_sources, dtype=dtype)
    for stage in stages(backbone, graph, parts, apart, steps, method):
        with stage.interpolated:
            for at in input_gradients(backbone, graph, parts, batch, metric, steps, stage.sources.start):
                _score(scores, at, graph, stage)
    return scores


@dataclass(frozen=True)
class Stage:
    """Runs that share one interpolation.

    sources       the first of them is interpolated; scores are taken for all of them
    interpolated  while open, row k of a run is at (k + 1) / m of the way from corrupt to clean
    written       differences of those of these sources that are asked for, as `NodeOutputs.groups` gives them
    """

    sources: range
    interpolated: AbstractContextManager
    written: Callable[[Callable[[range], bool]], Iterator[tuple[range, Tensor]]]


def stages(
    backbone: Backbone, graph: EdgeGraph, parts: Sequence[BlockParts], apart: NodeOutputs, steps: int, method: Method
) -> Iterator[Stage]:
    """One stage for EAP and EAP-IG over inputs; one for the embedding, each layer's heads and each FFN over activations."""
    n = apart.embedding.shape[0]
    share = torch.arange(steps - 1, -1, -1, device=apart.embedding.device) / steps  # of corrupt: (m - k) / m
    share = share.to(apart.embedding.dtype).repeat_interleave(n)[:, None, None]

    def towards(difference: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda clean: clean + share * difference.repeat(steps, 1, 1)

    at_input = edit_module_inputs({backbone.layers[0]: towards(apart.embedding)})
    if method != "eap-ig-activations":
        yield Stage(range(graph.n_sources), at_input, lambda wanted: apart.groups(parts, wanted))
        return
    for sources, difference in apart.groups(parts):
        if sources.start == 0:
            edit = at_input
        else:
            layer = (sources.start - 1) // (graph.n_heads + 1)
            edit = _edit_output(_writer(graph, parts[layer], sources), towards(difference.sum(0)))
        yield Stage(sources, edit, lambda wanted, group=(sources, difference): iter([group] if wanted(group[0]) else []))


def _writer(graph: EdgeGraph, part: BlockParts, sources: range) -> nn.Module:
    return part.ffn if sources.start == graph.ffn(part.layer) else part.output


def _edit_output(module: nn.Module, edit: Callable[[Tensor], Tensor]) -> AbstractContextManager:
    return edit_module_outputs({module: lambda _x, y: edit(y)})


def _score(scores: Tensor, at: InputGradients, graph: EdgeGraph, stage: Stage) -> None:
    """Fill in the edges from the stage's sources to these destinations."""
    before = graph.n_before(at.destinations[0])
    for sources, written in stage.written(lambda sources: sources.start < before):
        rows = slice(at.destinations.start, at.destinations.stop), slice(sources.start, sources.stop)
        for pair, scored in enumerate(scores):  # each a product of two views; einsum would copy both to batch it
            scored[rows] = at.values[:, pair].flatten(1) @ written[:, pair].flatten(1).T
