"""Edge attribution against brute force: exact patching, finite differences, and what integrated gradients add up to."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GraniteConfig

from paving.circuit.edges import edge_scores, kl_from_clean, logit_difference
from paving.circuit.edges.circuit import EdgeCircuit, whole_graph
from paving.circuit.edges.faithfulness import patched_logits
from paving.circuit.edges.graph import EdgeGraph, taken_apart
from paving.circuit.edges.metrics import measured
from paving.circuit.edges.nodes import NodeOutputs, recorded
from paving.circuit.edges.scores import METHODS
from paving.circuit.mask import CircuitError
from paving.circuit.token_pairs import last_logits, pair_batches
from tiny_edges import TokenPair, exact_patching, linear, mixed_logits, scores_of, shallow, some_pairs
from tiny_models import CONFIGS, SIZES, hooks_on, tiny_backbone

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2")


@pytest.fixture(scope="module", params=("llama", "phi3", "gpt2"))
def linear_model(request):
    backbone = linear(request.param)
    pairs = some_pairs()
    return backbone, pairs, exact_patching(backbone, pairs, mixed_logits)


@pytest.mark.parametrize("method", METHODS)
def test_on_a_linear_model_every_edges_score_is_its_exact_patching_effect(linear_model, method):
    backbone, pairs, effects = linear_model
    scores = scores_of(backbone, pairs, mixed_logits, method, steps=3)
    assert torch.allclose(scores, effects, atol=1e-5, rtol=1e-5)
    graph, _ = taken_apart(backbone)
    for name in ("a1.h0<q>", "a1.kv1<k>", "a1.kv1<v>", "m1", "logits"):  # the comparison is not one of zeros
        assert (effects[:, graph.destination_names.index(name), : graph.heads(1).start].abs() > 1e-2).any(), name


def test_an_edge_into_a_key_or_value_group_is_the_patching_of_that_groups_rows_by_hand():
    """The same effect with nothing of ours but the scores: torch hooks on one slice of k_proj or v_proj."""
    backbone, (pair,) = linear("llama"), some_pairs(((7, 7),))
    layers, head_dim = backbone.layers, 8
    seen = {}

    def run(ids, patch=None):
        handles = [layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _m, args: seen.update(mixed=args[0]))]
        if patch is not None:
            module, change = patch
            handles.append(module.register_forward_hook(lambda _m, _args, y: y + change))
        with torch.no_grad():
            logits = backbone.model(torch.tensor([ids]), use_cache=False).logits[:, -1]
        for handle in handles:
            handle.remove()
        return mixed_logits(logits), seen["mixed"]

    (clean, before), (_, after) = run(pair.clean), run(pair.corrupt)
    graph, _ = taken_apart(backbone)
    scores = scores_of(backbone, (pair,), mixed_logits, "eap")[0]
    head = slice(head_dim, 2 * head_dim)
    written = (after - before)[..., head] @ layers[0].self_attn.o_proj.weight[:, head].T  # what head 1 adds to the stream
    for name in ("k", "v"):
        module = getattr(layers[1].self_attn, f"{name}_proj")
        change = written @ module.weight.T
        change[..., :head_dim] = 0  # group 1 alone
        effect = run(pair.clean, (module, change))[0] - clean
        score = scores[graph.destination_names.index(f"a1.kv1<{name}>"), graph.source_names.index("a0.h1")]
        assert abs(effect.item()) > 1e-2 and abs(effect.item() - score.item()) < 1e-5


@pytest.mark.parametrize("architecture", FAMILIES)
def test_eap_is_the_derivative_of_exact_patching_on_an_ordinary_model(architecture):
    backbone, pairs = shallow(architecture), some_pairs()
    graph, parts = taken_apart(backbone)
    (batch,) = pair_batches(backbone, pairs, len(pairs))
    clean, logits = recorded(backbone, parts, batch.clean, batch.clean_mask)
    corrupt, _ = recorded(backbone, parts, batch.corrupt, batch.corrupt_mask)

    def towards(near, far, share=1e-6):
        return near + share * (far - near)

    nearby = NodeOutputs(
        towards(clean.embedding, corrupt.embedding),
        [towards(a, b) for a, b in zip(clean.mixed, corrupt.mixed, strict=True)],
        [towards(a, b) for a, b in zip(clean.ffn, corrupt.ffn, strict=True)],
    )
    scores, every = scores_of(backbone, pairs, mixed_logits, "eap"), whole_graph(graph).edges
    for source, destination in every:
        without = EdgeCircuit(graph, every - {(source, destination)})
        moved = measured(mixed_logits, patched_logits(backbone, parts, batch, without, nearby), batch.rows)
        slope = (moved - measured(mixed_logits, logits, batch.rows)) / 1e-6
        assert torch.allclose(slope, scores[:, destination, source], atol=1e-3, rtol=1e-3), (source, destination)


def test_integrated_gradients_of_the_edges_out_of_the_embedding_add_up_to_the_whole_change():
    backbone, pairs = shallow("llama"), some_pairs(((7, 7), (9, 9)))
    (batch,) = pair_batches(backbone, pairs, 2)
    with torch.no_grad():
        clean, corrupt = (
            mixed_logits(last_logits(backbone, *x))
            for x in ((batch.clean, batch.clean_mask), (batch.corrupt, batch.corrupt_mask))
        )

    def off(method, steps):
        added = scores_of(backbone, pairs, mixed_logits, method, steps)[:, :, 0].sum(1)
        return (added - (corrupt - clean)).abs().max().item()

    assert off("eap-ig-inputs", 200) < 0.02 * (corrupt - clean).abs().max()
    assert off("eap-ig-inputs", 200) < 0.6 * off("eap-ig-inputs", 100)  # and falls with 1/m, as Riemann sums do
    assert off("eap", 1) > 10 * off("eap-ig-inputs", 200)


def test_one_step_is_eap_and_the_embeddings_edges_agree_between_both_ways_of_interpolating():
    backbone, pairs = shallow("qwen2"), some_pairs()
    eap = scores_of(backbone, pairs, mixed_logits, "eap")
    inputs = scores_of(backbone, pairs, mixed_logits, "eap-ig-inputs", 4)
    activations = scores_of(backbone, pairs, mixed_logits, "eap-ig-activations", 4)
    assert torch.equal(eap, scores_of(backbone, pairs, mixed_logits, "eap-ig-inputs", 1))
    assert torch.allclose(eap, scores_of(backbone, pairs, mixed_logits, "eap-ig-activations", 1))
    assert torch.allclose(inputs[:, :, 0], activations[:, :, 0])
    assert not torch.allclose(inputs[:, :, 1:], activations[:, :, 1:], rtol=0.05)
    assert not torch.allclose(eap, inputs, rtol=0.05)


def test_integrated_gradients_follow_exact_patching_more_closely_than_one_gradient():
    backbone, pairs = shallow("gpt2", seed=2), some_pairs()
    effects = exact_patching(backbone, pairs, mixed_logits)
    there = effects != 0

    def correlation(method):
        return torch.corrcoef(torch.stack([scores_of(backbone, pairs, mixed_logits, method)[there], effects[there]]))[0, 1]

    eap, inputs, activations = map(correlation, METHODS)
    assert inputs > eap and activations > eap


@pytest.mark.parametrize("architecture", FAMILIES)
def test_node_outputs_add_up_to_the_residual_stream(architecture):
    backbone, pairs = shallow(architecture, layers=3), some_pairs()
    graph, parts = taken_apart(backbone)
    (batch,) = pair_batches(backbone, pairs, len(pairs))
    nodes, _ = recorded(backbone, parts, batch.clean, batch.clean_mask)
    final = []
    handle = backbone.layers[-1].register_forward_hook(lambda _m, _a, y: final.append(y if torch.is_tensor(y) else y[0]))
    with torch.no_grad():
        last_logits(backbone, batch.clean, batch.clean_mask)
    handle.remove()
    total = sum(written.sum(0) for _, written in nodes.groups(parts))
    total = total + sum(p.output.bias for p in parts if p.output.bias is not None)
    assert torch.allclose(total, final[0], atol=1e-10)
    assert [i for sources, _ in nodes.groups(parts) for i in sources] == list(range(graph.n_sources))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ("llama", "gpt2"))
def test_a_pairs_scores_do_not_depend_on_the_batch_it_is_in(architecture, method):
    backbone, pairs = shallow(architecture, dtype=torch.float32), some_pairs(((7, 7), (5, 12), (9, 4), (3, 3)))
    together = scores_of(backbone, pairs, mixed_logits, method, steps=2)
    for i, pair in enumerate(pairs):
        alone = scores_of(backbone, (pair,), mixed_logits, method, steps=2)[0]
        assert torch.allclose(together[i], alone, atol=1e-5, rtol=1e-4)
        assert together[i].abs().max() > 1e-2


def test_positions_that_only_one_prompt_has_are_not_patched():
    backbone, (pair,) = shallow("llama"), some_pairs(((6, 6),))
    graph, _ = taken_apart(backbone)
    longer = TokenPair("longer", (*range(20, 25), *pair.clean), pair.clean)  # the corrupt prompt is the clean one's end
    scores = scores_of(backbone, (longer,), mixed_logits, "eap")[0]
    assert scores[graph.logits, 0].abs() < 1e-12, "the last tokens are the same, and so are their embeddings"
    assert scores.abs().max() > 1e-3, "what attention made of the tokens before them is not"
    same = scores_of(backbone, (TokenPair("same", pair.clean, pair.clean),), mixed_logits, "eap-ig-inputs")
    assert not same.any()


def test_scores_of_all_pairs_are_means_and_nan_where_there_is_no_edge():
    backbone, pairs, seen = shallow("llama"), some_pairs(), []
    scores = edge_scores(backbone, pairs, mixed_logits, batch_size=2, steps=2, progress=seen.append)
    by_pair = scores_of(backbone, pairs, mixed_logits, "eap-ig-inputs", 2)
    edges = scores.graph.edges
    assert torch.allclose(scores.mean[edges], by_pair.mean(0)[edges])
    assert torch.allclose(scores.mean_absolute[edges], by_pair.abs().mean(0)[edges])
    assert scores.mean[~edges].isnan().all() and scores.n_pairs == 3 and seen == [2, 3]


def test_a_metric_of_its_own_for_every_pair():
    backbone, pairs = shallow("llama"), some_pairs()
    away = kl_from_clean(backbone, pairs, batch_size=2)
    assert edge_scores(backbone, pairs, away, method="eap").mean_absolute.nan_to_num().max() < 1e-9, "0 at the clean run"
    scores = edge_scores(backbone, pairs, away, method="eap-ig-inputs", batch_size=3)
    assert scores.mean_absolute.nan_to_num().max() > 1e-3
    alone = edge_scores(backbone, pairs[1:2], away[1:2], method="eap-ig-inputs")
    by_pair = scores_of(backbone, pairs, away, "eap-ig-inputs")
    assert torch.allclose(alone.mean[alone.graph.edges], by_pair[1][alone.graph.edges])


def test_the_model_is_left_without_hooks_and_bit_for_bit_as_it_was():
    backbone, pairs = tiny_backbone("llama"), some_pairs()
    before = {name: p.clone() for name, p in backbone.model.state_dict().items()}
    (batch,) = pair_batches(backbone, pairs, 3)
    with torch.no_grad():
        logits = last_logits(backbone, batch.clean, batch.clean_mask)
    for method in METHODS:
        edge_scores(backbone, pairs, logit_difference([5], [6]), method=method, steps=2)
    with pytest.raises(ZeroDivisionError):
        edge_scores(backbone, pairs, lambda logits: 1 / 0)
    assert not hooks_on(backbone.model)
    assert all(torch.equal(p, before[name]) for name, p in backbone.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())
    with torch.no_grad():
        assert torch.equal(logits, last_logits(backbone, batch.clean, batch.clean_mask))


@pytest.mark.parametrize("method", METHODS)
def test_no_tensor_grows_with_the_depth_of_the_graph(method):
    pairs = some_pairs(((40, 40),))

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if torch.is_tensor(x))])
            return out

    def largest(layers):
        backbone = shallow("llama", layers=layers)
        with Largest() as seen:
            scores_of(backbone, pairs, mixed_logits, method, steps=2)
        return seen.numel

    assert largest(2) == largest(5) < 40 * 32 * EdgeGraph(5, 4, 2).n_sources


@pytest.mark.parametrize("architecture", ("gemma2", "gemma3", "olmo2"))
def test_an_architecture_that_normalises_what_blocks_add_is_refused(architecture):
    with pytest.raises(CircuitError, match=r"take layer 0 of tiny.* apart.*Supported are .*Llama.*GPT-2"):
        edge_scores(tiny_backbone(architecture), some_pairs(), mixed_logits)


def test_a_block_that_scales_what_it_adds_is_found_out_when_it_runs(monkeypatch):
    monkeypatch.setitem(CONFIGS, "granite", lambda: GraniteConfig(**SIZES, residual_multiplier=0.5))
    with pytest.raises(CircuitError, match="not the sum of what heads and FFNs"):
        edge_scores(tiny_backbone("granite"), some_pairs(), mixed_logits)


@pytest.mark.parametrize(
    "pairs, metric, options, message",
    [
        ((), mixed_logits, {}, "leave nothing to attribute"),
        (some_pairs(((0, 3),)), mixed_logits, {}, "pair-0 has prompts of 0 and 3 tokens"),
        (some_pairs(((300, 3),)), mixed_logits, {}, "takes 1 to 256"),
        (some_pairs(), torch.sum, {}, "one number a row"),
        (some_pairs(), [mixed_logits], {}, "1 metrics for 3 pairs"),
        (some_pairs(), mixed_logits, {"method": "eapig"}, "give one of eap, eap-ig-inputs"),
        (some_pairs(), mixed_logits, {"steps": 0}, "steps >= 1"),
        (some_pairs(), lambda logits: logits[:, 0] / 0, {}, "pair-0 are not finite in torch.float32"),
    ],
)
def test_what_cannot_be_attributed_is_refused(backbone, pairs, metric, options, message):
    with pytest.raises(CircuitError, match=message):
        edge_scores(backbone, pairs, metric, **options)
