"""Probes per layer: a planted direction is found, noise is not, and groups never straddle a fold."""

from __future__ import annotations

import numpy as np
import pytest

from paving.evaluation.diagnostics.separability import fold_of, layer_probes, probe_auc
from paving.prompts.types import Bucket, Prompt


def prompts(n=60):
    buckets = (Bucket.EDIT, Bucket.HARMFUL_KEEP, Bucket.BENIGN_KEEP)
    return [Prompt(f"p{i}", "x", buckets[i % 3], group=f"g{i}") for i in range(n)]


def test_the_layer_that_holds_the_label_is_found_and_the_one_of_noise_is_not():
    rows = prompts(240)
    generator = np.random.default_rng(0)
    states = generator.normal(size=(240, 2, 8)).astype(np.float32)
    states[:, 1, 0] += [4.0 * (p.bucket == Bucket.EDIT) for p in rows]
    noise, label = layer_probes(rows, states, (3, 7))
    assert (noise.layer, label.layer) == (3, 7)
    assert label.edit_vs_harmful > 0.97 and label.edit_vs_benign > 0.97
    assert 0.3 < noise.edit_vs_harmful < 0.7


def test_a_probe_that_only_knows_groups_is_not_credited():
    """Features that name the group: perfect within a split by prompt, worth nothing across groups."""
    rows, states = [], []
    for g in range(30):
        for i in range(4):
            rows.append(Prompt(f"p{g}-{i}", "x", Bucket.EDIT if g % 2 else Bucket.HARMFUL_KEEP, group=f"g{g}"))
            states.append(np.eye(30)[g])
    (probe,) = layer_probes(rows, np.array(states, dtype=np.float32)[:, None], (0,))
    assert probe.edit_vs_harmful < 0.75
    assert probe.edit_vs_benign is None


def test_one_class_alone_has_no_auc():
    x = np.ones((6, 2), dtype=np.float32)
    assert probe_auc(x, np.ones(6, dtype=bool), np.arange(6) % 2) is None
    assert probe_auc(x[:0], np.ones(0, dtype=bool), np.arange(0)) is None


def test_the_order_of_the_prompts_changes_nothing():
    rows = prompts(60)
    states = np.random.default_rng(1).normal(size=(60, 1, 4)).astype(np.float32)
    back = layer_probes(rows[::-1], states[::-1], (0,))[0]
    there = layer_probes(rows, states, (0,))[0]
    assert there.edit_vs_harmful == pytest.approx(back.edit_vs_harmful, abs=1e-6)
    assert {fold_of(p.group) for p in rows} == set(range(5))
