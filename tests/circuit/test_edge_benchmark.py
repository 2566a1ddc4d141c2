"""The pure parts of benchmarks/circuit_edges.py: what it counts as alive, and its floors. No time is asserted."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import circuit_edges

    yield circuit_edges
    for name in ("circuit_edges", "paired"):
        sys.modules.pop(name, None)


def test_live_tensors_are_those_alive_at_once_and_views_count_once(script):
    outside = torch.zeros(1000)
    with script.live_tensors() as most:
        for _ in range(5):  # freed each time
            a = torch.zeros(256)
            b = a.view(16, 16).t()
            del a, b
        a = torch.ones(128)
        a.add_(1)
        outside.mul_(2)
        kept = a + 1
        del a, kept
    assert most[0] == 4 * 256


def test_memory_is_flat_in_pairs_and_does_not_follow_the_graph_in_depth(script, backbone):
    """What the growth table shows, on smaller models: pairs not at all, layers far less than the graph's own tensor."""

    def most(layers, pairs):
        model = script.random_llama(backbone, layers, 128)
        with script.live_tensors() as alive:
            script.edge_scores(model, script.random_pairs(pairs, 32), script.logit_difference([5], [6]), steps=2)
        return alive[0]

    few, many = most(2, 2), most(2, 6)
    assert many < 1.02 * few
    per_layer = (most(6, 2) - most(4, 2)) / 2
    vector = 4 * 32 * 128
    assert per_layer < (7 + 2) * vector, "two records and their difference, a block's input a step, and the score matrices"


def test_floors_count_two_plain_runs_and_three_passes_a_step(script):
    size = script.ModelSize(n_layers=2, d_model=8, n_heads=2, n_kv_heads=1, head_dim=4, linear=100, head=20, item_bytes=4)
    settings = {"steps": 5, "tokens": 10, "pairs": 4, "batch_size": 2}
    inputs = script.floors(size, argparse.Namespace(method="eap-ig-inputs", **settings))
    eap = script.floors(size, argparse.Namespace(method="eap", **settings))
    assert (inputs["passes"], eap["passes"]) == (17, 5)
    once = 2 * 80 * 10 + 4 * 2 * 2 * 4 * 5 * 10 + 2 * 20
    n_edges = script.EdgeGraph(2, 2, 1).n_edges
    assert eap["operations"] == 4 * (5 * once + 2 * 10 * 8 * n_edges)
    assert inputs["bytes"] == eap["bytes"] == 2 * 5 * 100 * 4  # steps are one batch: weights are read once for all
