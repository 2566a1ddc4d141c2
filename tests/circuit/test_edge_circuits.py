"""Circuits out of edge scores: top-n, greedy search, pruning, files; and how faithful they are."""

from __future__ import annotations

import json
import math

import pytest
import torch

from paving.circuit.edges import (
    EdgeCircuit,
    EdgeGraph,
    EdgeScores,
    edge_scores,
    edges_into,
    faithfulness,
    ffn_layers,
    greedy_edges,
    load_circuit,
    top_edges,
    whole_graph,
)
from paving.circuit.edges.circuit import pruned
from paving.circuit.edges.graph import taken_apart
from paving.circuit.mask import CircuitError
from tiny_edges import mixed_logits, shallow, some_pairs
from tiny_models import hooks_on

GRAPH = EdgeGraph(n_layers=2, n_heads=4, n_kv_heads=2)


def graph_of(backbone) -> EdgeGraph:
    return taken_apart(backbone)[0]


def edge(name: str) -> tuple[int, int]:
    source, destination = name.split("->")
    return GRAPH.source_names.index(source), GRAPH.destination_names.index(destination)


def scored(**by_name: float) -> EdgeScores:
    values = torch.full(GRAPH.edges.shape, math.nan, dtype=torch.float64).masked_fill(GRAPH.edges, 0.0)
    for name, score in by_name.items():
        source, destination = edge(name)
        values[destination, source] = score
    return EdgeScores(GRAPH, values, values.abs(), 1)


def random_scores(seed: int) -> EdgeScores:
    values = torch.randn(GRAPH.edges.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    values = values.masked_fill(~GRAPH.edges, math.nan)
    return EdgeScores(GRAPH, values, values.abs(), 1)


def test_the_graph_counts_its_edges_and_knows_who_reads_what():
    # Layer 0: 4 q + 2 k + 2 v read the embedding, the FFN reads 1 + 4; layer 1: 8 * 6 and 10; logits 11.
    assert GRAPH.n_edges == 8 + 5 + 48 + 10 + 11
    assert [GRAPH.source_names[s] for s in GRAPH.read_by(GRAPH.destination_names.index("a1.kv1<v>"))] == ["a1.h2", "a1.h3"]
    assert [GRAPH.destination_names[d] for d in GRAPH.inputs_of[GRAPH.source_names.index("a1.h1")]] == [
        "a1.h1<q>", "a1.kv0<k>", "a1.kv0<v>",
    ]  # fmt: skip
    for destination in range(GRAPH.n_destinations):
        for source in GRAPH.read_by(destination):
            assert GRAPH.n_before(destination) <= source, "no node is computed from one that comes after it"
    assert not GRAPH.inputs_of[0] and list(GRAPH.read_by(GRAPH.logits)) == []


def test_top_edges_are_the_strongest_of_either_sign_and_lose_those_that_lead_nowhere():
    scores = scored(**{
        "input->m0": -5.0, "m0->logits": 4.0, "input->a0.h0<q>": 3.0,  # a0.h0 has no edge out
        "a0.h3->a1.kv1<v>": 2.0, "a1.h2->logits": 1.0,  # nothing feeds a0.h3
    })  # fmt: skip
    assert top_edges(scores, 2).names == ("input->m0", "m0->logits")
    assert top_edges(scores, 5).names == ("input->m0", "m0->logits")


def test_a_group_of_heads_is_fed_through_its_key_or_value():
    edges = {edge("input->a1.kv1<v>"), edge("a1.h2->logits"), edge("a1.h1->logits")}
    assert pruned(GRAPH, edges) == {edge("input->a1.kv1<v>"), edge("a1.h2->logits")}


def test_greedy_search_walks_up_from_the_logits():
    scores = scored(**{
        "input->m1": 9.0, "m1->logits": 0.1, "a0.h1->logits": 0.5, "input->a0.kv0<v>": 0.3, "input->a0.kv1<v>": 8.0,
    })  # fmt: skip
    # The strong edges are not on offer before what they lead to is; a0.h1 is of group 0, so kv1 never is.
    assert greedy_edges(scores, 2).names == ("input->a0.kv0<v>", "a0.h1->logits")
    assert greedy_edges(scores, 4).names == ("input->a0.kv0<v>", "input->m1", "a0.h1->logits", "m1->logits")
    assert top_edges(scores, 2).names == ()


@pytest.mark.parametrize("choose", (top_edges, greedy_edges))
@pytest.mark.parametrize("n", (1, 7, 20, 60))
def test_what_is_left_after_pruning_lies_on_a_path_from_input_to_logits(choose, n):
    for seed in range(3):
        circuit = choose(random_scores(seed), n)
        assert len(circuit.edges) <= n
        assert all(on_a_path(circuit.edges, e) for e in circuit.edges)


def on_a_path(edges, one) -> bool:
    """By walking back to the input and on to the logits, edge by edge."""

    def back(source):
        return source == 0 or any(back(s) for s, d in edges if d in GRAPH.inputs_of[source])

    def on(destination):
        return destination == GRAPH.logits or any(on(d) for s, d in edges if s in GRAPH.read_by(destination))

    return back(one[0]) and on(one[1])


@pytest.mark.parametrize("choose", (top_edges, greedy_edges))
def test_all_edges_are_the_whole_graph_and_other_sizes_are_refused(choose):
    assert choose(random_scores(0), GRAPH.n_edges) == whole_graph(GRAPH)
    for n in (0, GRAPH.n_edges + 1):
        with pytest.raises(CircuitError, match=f"the graph has {GRAPH.n_edges}"):
            choose(random_scores(0), n)


def test_ffn_layers_and_the_edges_into_a_node():
    circuit = EdgeCircuit(GRAPH, frozenset({edge("input->m1"), edge("m1->logits"), edge("a0.h0->m1"), edge("input->m0")}))
    assert ffn_layers(circuit) == (1,), "m0 writes to nobody in this circuit"
    assert list(edges_into(circuit, "m1")) == ["input", "a0.h0"]


def test_a_saved_circuit_is_read_back(tmp_path):
    circuit = greedy_edges(random_scores(4), 30)
    circuit.save(tmp_path / "circuit.json")
    assert load_circuit(tmp_path / "circuit.json") == circuit and circuit.edges
    assert json.loads((tmp_path / "circuit.json").read_text())["edges"] == list(circuit.names)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c | {"edges": ["m9->logits"]}, "'m9->logits', which its graph of 2 layers does not have"),
        (lambda c: c | {"edges": ["m1->a0.h0<q>"]}, "is no edge of a graph with 82 edges"),
        (lambda c: c | {"format": 9}, "has format 9"),
        (lambda c: {"edges": []}, "is no edge circuit"),
    ],
)
def test_a_file_that_is_no_circuit_is_refused(tmp_path, change, message):
    path = tmp_path / "circuit.json"
    whole_graph(GRAPH).save(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(CircuitError, match=message):
        load_circuit(path)
    path.write_text("{")
    with pytest.raises(CircuitError, match="is no edge circuit"):
        load_circuit(path)


@pytest.mark.parametrize("architecture", ("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2"))
def test_the_whole_graph_is_faithful_and_no_edges_are_the_corrupt_run(architecture):
    backbone, pairs = shallow(architecture, dtype=torch.float32), some_pairs()
    whole = faithfulness(backbone, pairs, whole_graph(graph_of(backbone)), mixed_logits, batch_size=2)
    none = faithfulness(backbone, pairs, EdgeCircuit(graph_of(backbone), frozenset()), mixed_logits, batch_size=2)
    assert abs(whole.normalised - 1) < 1e-5 and torch.equal(whole.circuit, whole.clean)
    assert abs(none.normalised) < 1e-5 and torch.allclose(none.circuit, none.corrupt, atol=1e-4)
    assert (whole.clean - whole.corrupt).abs().min() > 1e-2
    assert not hooks_on(backbone.model)


def test_every_input_patched_but_every_output_kept_is_the_corrupt_run_too():
    """The embedding's edges are outside, all others inside: these carry what corrupt embeddings made of the nodes."""
    backbone, pairs = shallow("llama"), some_pairs(((7, 7), (5, 5)))
    graph = graph_of(backbone)
    inner = EdgeCircuit(graph, frozenset((s, d) for s, d in whole_graph(graph).edges if s != 0))
    result = faithfulness(backbone, pairs, inner, mixed_logits)
    assert torch.allclose(result.circuit, result.corrupt, atol=1e-9), "from corrupt embeddings all else follows"
    outer = EdgeCircuit(graph, frozenset((s, d) for s, d in whole_graph(graph).edges if s == 0))
    part = faithfulness(backbone, pairs, outer, mixed_logits)
    assert not any(torch.allclose(part.circuit, other, atol=1e-2) for other in (part.corrupt, part.clean))


@pytest.mark.parametrize("lengths", ((7, 7), (9, 4), (4, 9)))
def test_an_edge_patched_on_an_ordinary_model_is_what_plain_hooks_make_of_it(lengths):
    backbone, (pair,) = shallow("llama"), some_pairs((lengths,))
    graph, layers = graph_of(backbone), backbone.layers
    clean, corrupt = torch.tensor([pair.clean]), torch.tensor([pair.corrupt])

    def run(ids, *handles):
        with torch.no_grad():
            logits = backbone.model(ids, use_cache=False).logits[:, -1]
        for handle in handles:
            handle.remove()
        return mixed_logits(logits)

    outputs = []
    for ids in (clean, corrupt):
        run(ids, layers[0].mlp.register_forward_hook(lambda _m, _a, y: outputs.append(y)))
    both = min(lengths)  # positions from the end that both prompts have; before them m0 writes what it writes
    change = torch.zeros_like(outputs[0])
    change[:, -both:] = outputs[1][:, -both:] - outputs[0][:, -both:]

    def patched(name):
        circuit = EdgeCircuit(graph, whole_graph(graph).edges - {edge(name)})
        return faithfulness(backbone, (pair,), circuit, mixed_logits).circuit

    block, stream = layers[1], []

    def one_head(module, head):
        def hook(_m, _a, y):
            rows = slice(8 * head, 8 * head + 8)
            y = y.clone()
            y[..., rows] = block.input_layernorm(stream[0] + change) @ module.weight[rows].T
            return y

        return hook

    keep = block.register_forward_pre_hook(lambda _m, args: stream.append(args[0]))
    run(clean, keep)
    add = [
        ("m0->m1", block.post_attention_layernorm.register_forward_pre_hook, lambda _m, args: args[0] + change),
        ("m0->logits", backbone.model.model.norm.register_forward_pre_hook, lambda _m, args: args[0] + change),
        ("m0->a1.h2<q>", block.self_attn.q_proj.register_forward_hook, one_head(block.self_attn.q_proj, 2)),
        ("m0->a1.kv1<k>", block.self_attn.k_proj.register_forward_hook, one_head(block.self_attn.k_proj, 1)),
        ("m0->a1.kv0<v>", block.self_attn.v_proj.register_forward_hook, one_head(block.self_attn.v_proj, 0)),
    ]
    base = run(clean)
    for name, register, hook in add:
        by_hand = run(clean, register(hook))
        assert (by_hand - base).abs() > 1e-4 and torch.allclose(patched(name), by_hand, atol=1e-9), name


def test_faithfulness_does_not_depend_on_the_batch():
    backbone, pairs = shallow("gpt2", dtype=torch.float32), some_pairs(((7, 7), (5, 12), (9, 4), (3, 3)))
    circuit = greedy_edges(edge_scores(backbone, pairs, mixed_logits, steps=2, batch_size=4), 60)
    alone, together = (faithfulness(backbone, pairs, circuit, mixed_logits, batch_size=n) for n in (1, 4))
    assert torch.allclose(alone.circuit, together.circuit, atol=1e-4)
    assert not torch.allclose(alone.circuit, alone.clean, atol=1e-2)


def test_a_circuit_of_another_model_is_refused_and_equal_runs_have_no_faithfulness():
    backbone = shallow("llama")
    with pytest.raises(CircuitError, match="Find the circuit of this model"):
        faithfulness(backbone, some_pairs(), whole_graph(EdgeGraph(3, 4, 2)), mixed_logits)
    result = faithfulness(backbone, some_pairs(), whole_graph(GRAPH), lambda logits: torch.zeros(len(logits)))
    assert math.isnan(result.normalised)
