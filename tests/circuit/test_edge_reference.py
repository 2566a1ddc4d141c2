"""Edge attribution against the authors' own code: Hanna et al.'s package `eap`, on the same weights in TransformerLens.

Neither is a dependency: `eap` is on GitHub (hannamw/EAP-IG, src/eap), and takes a TransformerLens that still has
`HookedTransformer`, before 4. Every score of every edge is compared. Where their definitions differ from ours, by intent:

- Every query head has a key and a value input of its own there, also where heads share them: an edge into a group is the sum
  of theirs into the group's heads.
- EAP-IG over inputs steps from k = 0, the corrupt prompt, to m - 1 in the version at hand, and here from 1 to m, the clean
  one. Exchanging the prompts turns one into the other, and the sign.
- EAP-IG over activations averages the runs of all sources there, and takes a source's own runs here. Theirs are told apart
  by what each run adds to the score matrix. In the runs of `input` their interpolated embedding needs no gradient, so that
  without learned positions (Llama) the first layer's heads get none either: the test adds a zero that needs one.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from paving.circuit.edges import logit_difference
from paving.circuit.edges.graph import EdgeGraph, taken_apart
from tiny_edges import scores_of, shallow, some_pairs
from tiny_models import HIDDEN, SIZES, VOCABULARY

WHY = "the reference is no dependency: it takes hannamw/EAP-IG and a TransformerLens before 4"
lens, conversions, attribute, reference_graph = (
    pytest.importorskip(name, reason=WHY, exc_type=ImportError)
    for name in ("transformer_lens", "transformer_lens.pretrained.weight_conversions", "eap.attribute", "eap.graph")
)

LAYERS, HEADS, STEPS = 3, SIZES["num_attention_heads"], 4
SHAPE = {
    "n_layers": LAYERS, "n_heads": HEADS, "d_model": HIDDEN, "d_head": HIDDEN // HEADS, "d_vocab": VOCABULARY,
    "n_ctx": SIZES["max_position_embeddings"], "dtype": torch.float64, "device": "cpu",
    "use_attn_result": True, "use_split_qkv_input": True, "use_hook_mlp_in": True,
}  # fmt: skip
FAMILIES = {
    "llama": {
        "n_key_value_heads": SIZES["num_key_value_heads"], "ungroup_grouped_query_attention": True, "final_rms": True,
        "normalization_type": "RMS", "eps": 1e-6, "positional_embedding_type": "rotary", "rotary_dim": HIDDEN // HEADS,
        "gated_mlp": True, "act_fn": "silu", "d_mlp": SIZES["intermediate_size"],
    },
    "gpt2": {"normalization_type": "LN", "eps": 1e-5, "act_fn": "gelu_new", "d_mlp": 4 * HIDDEN},
}  # fmt: skip
PAIRS = some_pairs(((9, 9), (7, 7), (12, 12)))  # of equal lengths, as the reference demands
METRIC = logit_difference([5], [6])


@pytest.fixture(scope="module", params=tuple(FAMILIES))
def both(request):
    """The same tiny model here and in TransformerLens."""
    backbone = shallow(request.param, layers=LAYERS)
    config = lens.HookedTransformerConfig(**SHAPE, **FAMILIES[request.param])
    theirs = lens.HookedTransformer(config)
    weights = getattr(conversions, f"convert_{request.param}_weights")(backbone.model, config)
    theirs.load_state_dict(weights, strict=False)  # what is missing are masks, and GPT-2's bias of logits, which is 0
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    theirs.blocks[0].register_forward_pre_hook(lambda _block, args: (args[0] + zero, *args[1:]))
    return backbone, theirs


@pytest.fixture
def runs(monkeypatch, both):
    """runs(method, clean, corrupt): (n_runs, n_destinations, n_sources), what each of their runs adds to the scores."""
    backbone, model = both
    matrices: list[Tensor] = []
    zeros, hooks = torch.zeros, attribute.make_hooks_and_matrices

    def on_cpu(*size, device=None, **options) -> Tensor:
        return zeros(*size, device="cpu" if device == "cuda" else device, **options)

    def kept(model, graph, batch_size, n_tokens, scores):
        matrices.append(scores)
        return hooks(model, graph, batch_size, n_tokens, scores)

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

        graph = reference_graph.Graph.from_model(model)
        graph.scores = graph.scores.double()
        attribute.attribute(model, graph, [([clean], [corrupt], None)], metric, method, ig_steps=steps, quiet=True)
        added = torch.stack([*before, graph.scores * len(before)]).diff(dim=0)
        return in_our_places(taken_apart(backbone)[0], graph, added)

    return run


def in_our_places(ours: EdgeGraph, theirs, added: Tensor) -> Tensor:
    """Their (n, n_sources, n_inputs) as our (n, n_destinations, n_sources), by the names of the nodes."""
    placed = torch.zeros(len(added), ours.n_destinations, ours.n_sources, dtype=added.dtype)
    for edge in theirs.edges.values():
        name, kind = edge.child.name, edge.qkv
        if kind is not None:
            group = f"a{edge.child.layer}.kv{edge.child.head * ours.n_kv_heads // HEADS}"
            name = f"{name if kind == 'q' else group}<{kind}>"
        place = ours.destination_names.index(name), ours.source_names.index(edge.parent.name)
        placed[:, *place] += added[:, *edge.matrix_index]
    return placed


def off(both, method: str, theirs: Sequence[Tensor]) -> float:
    """The largest difference of a score from theirs of each pair, as a share of the pair's largest score."""
    ours, theirs = scores_of(both[0], PAIRS, METRIC, method, STEPS), torch.stack(list(theirs))
    assert (theirs != 0).sum() == len(PAIRS) * taken_apart(both[0])[0].n_edges, "the comparison is not one of zeros"
    return ((ours - theirs).abs().amax((1, 2)) / theirs.abs().amax((1, 2))).max().item()


def test_both_libraries_compute_the_same_logits(both):
    for ids in (torch.tensor([pair.clean]) for pair in PAIRS):
        with torch.no_grad():
            assert torch.allclose(both[0].model(ids, use_cache=False).logits, both[1](ids), atol=1e-5)


def test_every_score_of_eap_is_theirs(both, runs):
    assert off(both, "eap", [runs("EAP", p.clean, p.corrupt).mean(0) for p in PAIRS]) < 1e-5


def test_every_score_of_integrated_gradients_over_inputs_is_theirs_with_the_prompts_exchanged(both, runs):
    ends = [(p.clean, p.corrupt) for p in PAIRS]
    # A version that steps from 1 to m takes its only step of one at the clean prompt, as EAP does.
    from_one = torch.allclose(runs("EAP-IG-inputs", *ends[0], 1), runs("EAP", *ends[0]))
    forth = [runs("EAP-IG-inputs", clean, corrupt).mean(0) for clean, corrupt in ends]
    back = [-runs("EAP-IG-inputs", corrupt, clean).mean(0) for clean, corrupt in ends]
    same, other = (forth, back) if from_one else (back, forth)
    assert off(both, "eap-ig-inputs", same) < 1e-5 and off(both, "eap-ig-inputs", other) > 1e-2


def test_every_score_of_integrated_gradients_over_activations_is_what_the_runs_of_its_own_source_add(both, runs):
    stage = [0, *(2 * layer + 1 + (node == HEADS) for layer in range(LAYERS) for node in range(HEADS + 1))]
    own = []
    for pair in PAIRS:
        stages = runs("EAP-IG-activations", pair.clean, pair.corrupt).unflatten(0, (-1, STEPS)).mean(1)
        own.append(torch.stack([stages[at, :, source] for source, at in enumerate(stage)], -1))
    assert off(both, "eap-ig-activations", own) < 1e-5
