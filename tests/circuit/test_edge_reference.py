"""Edge attribution against the authors' own code: Hanna et al.'s package `eap`, on the same weights in TransformerLens.

Neither is a dependency. `eap` is on GitHub (hannamw/EAP-IG, src/eap), and imports `HookedTransformer`, which TransformerLens
has up to version 3. Every score of every edge is compared. Where their definitions differ from ours, by intent:

- A query head has a key and a value input of its own there, also where heads share them. An edge into a group here is the
  sum of theirs into the group's heads.
- EAP-IG over inputs steps from k = 0 (the corrupt prompt) to m - 1 in the version at hand, and here from 1 to m (the clean
  one). Exchanging a pair's prompts turns one into the other, and the sign.
- EAP-IG over activations returns the average over the runs of all sources, and a score here takes the runs that interpolate
  its own source. Theirs are told apart by what each run adds to the score matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from paving.backbone import Backbone
from paving.circuit.edges import TokenPair, logit_difference
from paving.circuit.edges.graph import EdgeGraph, taken_apart
from tiny_edges import scores_of, shallow, some_pairs
from tiny_models import HIDDEN, SIZES, VOCABULARY

lens = pytest.importorskip("transformer_lens", reason="TransformerLens runs the reference's models, and is not a dependency")
WHY = "the reference, hannamw/EAP-IG, is not a dependency, and needs a TransformerLens before 4 (HookedTransformer)"
conversions = pytest.importorskip("transformer_lens.pretrained.weight_conversions", reason=WHY, exc_type=ImportError)
attribute = pytest.importorskip("eap.attribute", reason=WHY, exc_type=ImportError)
eap_graph = pytest.importorskip("eap.graph", reason=WHY, exc_type=ImportError)

LAYERS, HEADS, STEPS = 3, SIZES["num_attention_heads"], 4
FAMILIES = {
    "llama": {
        "n_key_value_heads": SIZES["num_key_value_heads"], "ungroup_grouped_query_attention": True, "final_rms": True,
        "normalization_type": "RMS", "eps": 1e-6, "positional_embedding_type": "rotary", "rotary_dim": HIDDEN // HEADS,
        "gated_mlp": True, "act_fn": "silu", "d_mlp": SIZES["intermediate_size"],
    },
    "gpt2": {"normalization_type": "LN", "eps": 1e-5, "act_fn": "gelu_new", "d_mlp": 4 * HIDDEN},
}  # fmt: skip
METRIC = logit_difference([5], [6])


@dataclass(frozen=True)
class Both:
    """One tiny model in both libraries, and pairs of equal lengths, which the reference demands."""

    ours: Backbone
    theirs: Any
    pairs: tuple[TokenPair, ...]

    @property
    def graph(self) -> EdgeGraph:
        return taken_apart(self.ours)[0]


@pytest.fixture(scope="module", params=tuple(FAMILIES))
def both(request) -> Both:
    backbone = shallow(request.param, layers=LAYERS)
    shape = {"n_layers": LAYERS, "d_model": HIDDEN, "n_heads": HEADS, "d_head": HIDDEN // HEADS, "d_vocab": VOCABULARY}
    needed = {"use_attn_result": True, "use_split_qkv_input": True, "use_hook_mlp_in": True}
    config = lens.HookedTransformerConfig(
        **shape,
        n_ctx=SIZES["max_position_embeddings"],
        device="cpu",
        dtype=torch.float64,
        **needed,
        **FAMILIES[request.param],
    )
    theirs = lens.HookedTransformer(config)
    convert = getattr(conversions, f"convert_{request.param}_weights")
    theirs.load_state_dict(convert(backbone.model, config), strict=False)  # what is missing are masks, and a bias that is 0
    return Both(backbone, theirs, some_pairs(((9, 9), (7, 7), (12, 12))))


@pytest.fixture
def runs(monkeypatch, both):
    """runs(method, clean, corrupt, steps): (n_runs, n_destinations, n_sources), what every run with a gradient adds."""
    matrices: list[Tensor] = []
    zeros, hooks = torch.zeros, attribute.make_hooks_and_matrices

    def on_cpu(*size, device=None, **options) -> Tensor:
        return zeros(*size, device="cpu" if device == "cuda" else device, **options)

    def kept(model, graph, batch_size, n_pos, scores):
        matrices.append(scores)
        return hooks(model, graph, batch_size, n_pos, scores)

    def as_they_are(_model, ids: Sequence[Sequence[int]]):
        tokens = torch.tensor(ids)
        return tokens, torch.ones_like(tokens), torch.tensor([tokens.shape[1]]), tokens.shape[1]

    monkeypatch.setattr(torch, "zeros", on_cpu)
    monkeypatch.setattr(attribute, "make_hooks_and_matrices", kept)
    monkeypatch.setattr(attribute, "tokenize_plus", as_they_are)

    def run(method: str, clean: Sequence[int], corrupt: Sequence[int], steps: int = STEPS) -> Tensor:
        before: list[Tensor] = []

        def metric(logits, _clean_logits, _lengths, _label) -> Tensor:
            before.append(matrices[-1].clone())
            return METRIC(logits[:, -1]).sum()

        graph = eap_graph.Graph.from_model(both.theirs)
        graph.scores = graph.scores.to(torch.float64)
        attribute.attribute(both.theirs, graph, [([clean], [corrupt], None)], metric, method, ig_steps=steps, quiet=True)
        added = torch.stack([*before, graph.scores * len(before)]).diff(dim=0)
        return torch.stack([in_our_places(both.graph, graph, matrix) for matrix in added])

    return run


def in_our_places(ours: EdgeGraph, theirs, matrix: Tensor) -> Tensor:
    """Their (n_sources, n_inputs) as our (n_destinations, n_sources), by the names of the nodes."""
    placed = torch.zeros(ours.n_destinations, ours.n_sources, dtype=matrix.dtype)
    for edge in theirs.edges.values():
        name = edge.child.name
        if edge.qkv == "q":
            name += "<q>"
        elif edge.qkv is not None:
            name = f"a{edge.child.layer}.kv{edge.child.head * ours.n_kv_heads // ours.n_heads}<{edge.qkv}>"
        placed[ours.destination_names.index(name), ours.source_names.index(edge.parent.name)] += matrix[edge.matrix_index]
    return placed


def off(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of a score, as a share of the largest score of the pair."""
    assert ours.shape == theirs.shape and (theirs != 0).float().mean() > 0.4
    return ((ours - theirs).abs().amax((1, 2)) / theirs.abs().amax((1, 2))).max().item()


def test_both_libraries_compute_the_same_logits(both):
    for pair in both.pairs:
        ids = torch.tensor([pair.clean])
        with torch.no_grad():
            assert torch.allclose(both.ours.model(ids, use_cache=False).logits, both.theirs(ids), atol=1e-4)


def test_every_score_of_eap_is_theirs(both, runs):
    theirs = torch.stack([runs("EAP", pair.clean, pair.corrupt).mean(0) for pair in both.pairs])
    assert off(scores_of(both.ours, both.pairs, METRIC, "eap"), theirs) < 1e-5


def test_every_score_of_integrated_gradients_over_inputs_is_theirs_with_the_prompts_exchanged(both, runs):
    first = both.pairs[0]
    one, eap = (runs(method, first.clean, first.corrupt, 1) for method in ("EAP-IG-inputs", "EAP"))
    from_one = torch.allclose(one, eap)  # a version that steps from 1 to m takes its only step at the clean prompt
    theirs = [
        runs("EAP-IG-inputs", p.clean, p.corrupt) if from_one else -runs("EAP-IG-inputs", p.corrupt, p.clean)
        for p in both.pairs
    ]
    scores = scores_of(both.ours, both.pairs, METRIC, "eap-ig-inputs", STEPS)
    assert off(scores, torch.stack(theirs).mean(1)) < 1e-5
    assert off(scores, torch.stack([runs("EAP", p.clean, p.corrupt).mean(0) for p in both.pairs])) > 1e-2


def test_every_score_of_integrated_gradients_over_activations_is_what_their_runs_of_its_own_source_add(both, runs):
    graph = both.graph
    stage = [0, *((2 * layer + 1 + (node == HEADS)) for layer in range(LAYERS) for node in range(HEADS + 1))]
    own = []
    for pair in both.pairs:
        stages = runs("EAP-IG-activations", pair.clean, pair.corrupt).unflatten(0, (-1, STEPS)).mean(1)
        own.append(torch.stack([stages[stage[source], :, source] for source in range(graph.n_sources)], -1))
    assert off(scores_of(both.ours, both.pairs, METRIC, "eap-ig-activations", STEPS), torch.stack(own)) < 1e-5
