"""Circuits of edges: chosen from scores by top-n or greedily, pruned, kept as JSON."""

from __future__ import annotations

import heapq
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from paving.circuit.edges.graph import EdgeGraph
from paving.circuit.edges.scores import EdgeScores
from paving.circuit.mask import CircuitError

FORMAT = 1


@dataclass(frozen=True)
class EdgeCircuit:
    """Some edges of a graph. edges: (source, destination) indices of the graph."""

    graph: EdgeGraph
    edges: frozenset[tuple[int, int]]

    def __post_init__(self) -> None:
        for source, destination in self.edges:
            known = 0 <= source < self.graph.n_sources and 0 <= destination < self.graph.n_destinations
            if not known or source >= self.graph.n_before(destination):
                raise CircuitError(f"({source}, {destination}) is no edge of a graph with {self.graph.n_edges} edges.")

    @cached_property
    def mask(self) -> Tensor:
        """(n_destinations, n_sources) bool: the edges in the circuit."""
        mask = torch.zeros(self.graph.n_destinations, self.graph.n_sources, dtype=torch.bool)
        for source, destination in self.edges:
            mask[destination, source] = True
        return mask

    @property
    def names(self) -> tuple[str, ...]:
        """As `m0->a3.h1<q>`, in the order of computation."""
        order = sorted((destination, source) for source, destination in self.edges)
        return tuple(f"{self.graph.source_names[s]}->{self.graph.destination_names[d]}" for d, s in order)

    @property
    def sources(self) -> frozenset[int]:
        """Nodes with an edge out."""
        return frozenset(source for source, _ in self.edges)

    def save(self, path: Path | str) -> None:
        shape = {"n_layers": self.graph.n_layers, "n_heads": self.graph.n_heads, "n_kv_heads": self.graph.n_kv_heads}
        text = json.dumps({"format": FORMAT, "graph": shape, "edges": self.names}, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")


def load_circuit(path: Path | str) -> EdgeCircuit:
    """raises CircuitError for a file that is no edge circuit, or names edges that its own graph does not have"""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise CircuitError(f"{path} has format {content['format']}; this version reads format {FORMAT}.")
        graph, names = EdgeGraph(**content["graph"]), content["edges"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CircuitError(f"{path} is no edge circuit: {error!r}. Write one with EdgeCircuit.save.") from error
    sources = {name: i for i, name in enumerate(graph.source_names)}
    destinations = {name: i for i, name in enumerate(graph.destination_names)}
    edges = set()
    for name in names:
        source, _, destination = name.partition("->")
        if source not in sources or destination not in destinations:
            raise CircuitError(f"{path} names the edge {name!r}, which its graph of {graph.n_layers} layers does not have.")
        edges.add((sources[source], destinations[destination]))
    return EdgeCircuit(graph, frozenset(edges))


def whole_graph(graph: EdgeGraph) -> EdgeCircuit:
    """Every edge."""
    return EdgeCircuit(graph, frozenset((s, d) for d, s in graph.edges.nonzero().tolist()))


# --- choosing ---


def top_edges(scores: EdgeScores, n: int) -> EdgeCircuit:
    """The n edges of highest |mean score|, pruned, so that fewer may be left. Ties go to the earlier edge.

    raises CircuitError unless 0 < n <= the graph's edges
    """
    _check_size(scores, n)
    # nan (no edge) sorts last as -1; stable, so that the same scores give the same circuit everywhere.
    order = _strength(scores).flatten().argsort(descending=True, stable=True)[:n].tolist()
    edges = {(i % scores.graph.n_sources, i // scores.graph.n_sources) for i in order}
    return EdgeCircuit(scores.graph, pruned(scores.graph, edges))


def greedy_edges(scores: EdgeScores, n: int) -> EdgeCircuit:
    """From the logits upwards: n times the edge of highest |mean score| into a node already in the circuit, then pruned.

    Hanna et al., appendix on circuit finding; a maximising counterpart of Dijkstra's search. A head in the circuit offers
    the edges into its query and into the key and value of its group.

    raises CircuitError unless 0 < n <= the graph's edges
    """
    _check_size(scores, n)
    graph, strength = scores.graph, _strength(scores).tolist()
    heap: list[tuple[float, int, int]] = []
    offered: set[int] = set()
    edges: set[tuple[int, int]] = set()

    def offer(destinations: Collection[int]) -> None:
        for destination in set(destinations) - offered:
            offered.add(destination)
            for source in range(graph.n_before(destination)):
                heapq.heappush(heap, (-strength[destination][source], destination, source))

    offer([graph.logits])
    while heap and len(edges) < n:
        _, destination, source = heapq.heappop(heap)
        edges.add((source, destination))
        offer(graph.inputs_of[source])
    return EdgeCircuit(graph, pruned(graph, edges))


def _check_size(scores: EdgeScores, n: int) -> None:
    if not 0 < n <= scores.graph.n_edges:
        raise CircuitError(f"a circuit of {n} edges cannot be chosen: the graph has {scores.graph.n_edges}; give 1 to that.")


def _strength(scores: EdgeScores) -> Tensor:
    return scores.mean.abs().nan_to_num(nan=-1.0)


def pruned(graph: EdgeGraph, edges: Collection[tuple[int, int]]) -> frozenset[tuple[int, int]]:
    """The edges (source, destination) on some path from input to logits."""
    into: dict[int, list[int]] = {}
    for source, destination in edges:
        into.setdefault(destination, []).append(source)
    fed = {0}  # indices run in the order of computation, so one sweep each way is enough
    for source in range(1, graph.n_sources):
        if any(s in fed for destination in graph.inputs_of[source] for s in into.get(destination, ())):
            fed.add(source)
    used = {graph.logits}
    for source in reversed(range(graph.n_sources)):
        if any(source == s for destination in used for s in into.get(destination, ())):
            used.update(graph.inputs_of[source])
    return frozenset((s, d) for s, d in edges if s in fed and d in used)


def ffn_layers(circuit: EdgeCircuit) -> tuple[int, ...]:
    """Layers whose FFN writes along an edge of the circuit: where an edit of FFN neurons stays inside it."""
    return tuple(layer for layer in range(circuit.graph.n_layers) if circuit.graph.ffn(layer) in circuit.sources)


def edges_into(circuit: EdgeCircuit, name: str) -> Iterator[str]:
    """Names of the sources that a destination reads in the circuit, such as `logits` or `a3.kv0<v>`."""
    destination = circuit.graph.destination_names.index(name)
    return (circuit.graph.source_names[s] for s in range(circuit.graph.n_sources) if (s, destination) in circuit.edges)
