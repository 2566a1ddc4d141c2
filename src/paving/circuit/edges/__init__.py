"""Circuits at edge level: EAP and EAP-IG on an unconverted Hugging Face decoder (Hanna et al., arXiv 2403.17806)."""

from paving.circuit.edges.circuit import (
    EdgeCircuit,
    edges_into,
    ffn_layers,
    greedy_edges,
    load_circuit,
    top_edges,
    whole_graph,
)
from paving.circuit.edges.faithfulness import Faithfulness, faithfulness
from paving.circuit.edges.graph import EdgeGraph
from paving.circuit.edges.metrics import kl_from, kl_from_clean, logit_difference
from paving.circuit.edges.scores import EdgeScores, edge_scores
from paving.circuit.token_pairs import TokenPair, token_pairs

__all__ = [
    "EdgeCircuit",
    "EdgeGraph",
    "EdgeScores",
    "Faithfulness",
    "TokenPair",
    "edge_scores",
    "edges_into",
    "faithfulness",
    "ffn_layers",
    "greedy_edges",
    "kl_from",
    "kl_from_clean",
    "load_circuit",
    "logit_difference",
    "token_pairs",
    "top_edges",
    "whole_graph",
]
