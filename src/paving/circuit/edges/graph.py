"""The graph whose edges a circuit is made of: which nodes write to the residual stream, and who reads them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from paving.backbone import Backbone, BackboneError
from paving.backbone.attention_parts import SUPPORTED, BlockParts, block_parts
from paving.circuit.mask import CircuitError


@dataclass(frozen=True)
class EdgeGraph:
    """The computational graph of a decoder, as Hanna et al. (arXiv 2403.17806, section 2) draw it.

    Sources write to the residual stream: `input` (the embedding), every head `a3.h1`, every FFN `m3`. Destinations read it:
    the query of every head, `a3.h1<q>`; the key and value of every key-value group, `a3.kv0<k>` and `a3.kv0<v>`, since
    grouped heads share them (without grouping there is one group a head); every FFN `m3`; and `logits`. An edge goes
    from each source to each destination after it. Indices run in the order of computation.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int

    # --- sources: input, then per layer its heads and its FFN ---

    @property
    def n_sources(self) -> int:
        return 1 + self.n_layers * (self.n_heads + 1)

    def heads(self, layer: int) -> range:
        start = 1 + layer * (self.n_heads + 1)
        return range(start, start + self.n_heads)

    def ffn(self, layer: int) -> int:
        return self.heads(layer).stop

    # --- destinations: per layer q, k, v and FFN, then logits ---

    @property
    def n_destinations(self) -> int:
        return self.n_layers * (self._attention_inputs + 1) + 1

    @property
    def logits(self) -> int:
        return self.n_destinations - 1

    def attention_inputs(self, layer: int) -> range:
        """Queries by head, then keys by group, then values by group."""
        start = layer * (self._attention_inputs + 1)
        return range(start, start + self._attention_inputs)

    def ffn_input(self, layer: int) -> int:
        return self.attention_inputs(layer).stop

    @property
    def _attention_inputs(self) -> int:
        return self.n_heads + 2 * self.n_kv_heads

    # --- edges ---

    def n_before(self, destination: int) -> int:
        """How many sources come before a destination: it reads sources 0 to n - 1."""
        if destination == self.logits:
            return self.n_sources
        layer, place = divmod(destination, self._attention_inputs + 1)
        return self.heads(layer).stop if place == self._attention_inputs else self.heads(layer).start

    @cached_property
    def edges(self) -> Tensor:
        """(n_destinations, n_sources) bool."""
        before = torch.tensor([self.n_before(d) for d in range(self.n_destinations)])
        return torch.arange(self.n_sources) < before[:, None]

    @property
    def n_edges(self) -> int:
        return int(self.edges.sum())

    def read_by(self, destination: int) -> range:
        """The sources that are computed from a destination: a group's heads, one head, one FFN; none for logits."""
        if destination == self.logits:
            return range(0)
        layer, place = divmod(destination, self._attention_inputs + 1)
        if place == self._attention_inputs:
            return range(self.ffn(layer), self.ffn(layer) + 1)
        if place < self.n_heads:
            return self.heads(layer)[place : place + 1]
        group, size = (place - self.n_heads) % self.n_kv_heads, self.n_heads // self.n_kv_heads
        return self.heads(layer)[group * size : (group + 1) * size]

    @cached_property
    def inputs_of(self) -> tuple[tuple[int, ...], ...]:
        """Per source, the destinations that it is computed from; none for `input`."""
        found: list[list[int]] = [[] for _ in range(self.n_sources)]
        for destination in range(self.n_destinations):
            for source in self.read_by(destination):
                found[source].append(destination)
        return tuple(map(tuple, found))

    # --- names ---

    @cached_property
    def source_names(self) -> tuple[str, ...]:
        layers = range(self.n_layers)
        return ("input", *(n for la in layers for n in (*(f"a{la}.h{h}" for h in range(self.n_heads)), f"m{la}")))

    @cached_property
    def destination_names(self) -> tuple[str, ...]:
        def of(layer: int) -> list[str]:
            queries = [f"a{layer}.h{h}<q>" for h in range(self.n_heads)]
            return [*queries, *(f"a{layer}.kv{g}<{x}>" for x in "kv" for g in range(self.n_kv_heads)), f"m{layer}"]

        return (*(name for layer in range(self.n_layers) for name in of(layer)), "logits")


def taken_apart(backbone: Backbone) -> tuple[EdgeGraph, tuple[BlockParts, ...]]:
    """The graph of a model, and the parts of its blocks.

    raises CircuitError for an architecture whose residual stream is not the plain sum of heads and FFNs
    """
    try:
        parts = block_parts(backbone)
    except BackboneError as error:
        raise CircuitError(f"edges cannot be attributed: {error}") from error
    shapes = {(p.q.n_heads, p.k.n_heads) for p in parts}
    if len(shapes) > 1:
        raise CircuitError(f"layers of {backbone.name} differ in their number of heads: {sorted(shapes)}. {SUPPORTED}")
    return EdgeGraph(len(parts), *shapes.pop()), parts
