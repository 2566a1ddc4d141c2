"""Refusal steering by WRMD."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from tiny_refusals import holds_to_the_protocol, last_states, material, train_and_calibration

from paving.backbone import render_batch
from paving.backbone.hooks import record_residuals
from paving.prompts.types import Bucket
from paving.steering.checks import SteeringError
from paving.steering.wrmd import RefusalSteering, WRMDConfig, fit_wrmd, weighted_ridge_difference
from tiny_models import logits_of, tiny_backbone

CONFIG = WRMDConfig(candidates=(0, 1, 2, 3, 4), n_layers=2, ridges=(0.1, 1.0, 10.0))
PROMPTS = [[p for b in CONFIG.buckets for p in train_and_calibration(material(), b)[split]] for split in (0, 1)]
# One edit prompt is answered, and one benign one refused: buckets are not labels.
CONFIDENCE = {p.id: 0.6 + 0.05 * i if p.bucket is Bucket.EDIT else 0.02 * i for rows in PROMPTS for i, p in enumerate(rows)}
CONFIDENCE |= {"t-edit-2": 0.3, "t-benign_keep-1": 0.5, "c-benign_keep-0": 0.9}


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.fixture(scope="module")
def steering(backbone):
    return fit_wrmd(backbone, material(), CONFIDENCE, CONFIG)


def plain(states: np.ndarray, c: np.ndarray, ridge: float) -> tuple[np.ndarray, float]:
    """(vector of length 1, gap), from the formula; ridge in units of the mean variance of a coordinate."""
    yes, no = c >= 0.5, c < 0.5
    refusing = np.average(states[yes], axis=0, weights=c[yes])
    complying = np.average(states[no], axis=0, weights=1 - c[no])
    sigma = np.cov(states[no].T, aweights=1 - c[no], ddof=0)
    penalty = ridge * np.trace(sigma) / len(sigma)
    v = np.linalg.inv(sigma + penalty * np.eye(len(sigma))) @ (refusing - complying)
    v /= np.linalg.norm(v)
    return v, (refusing - complying) @ v


def test_the_vector_is_the_formula():
    generator = np.random.default_rng(0)
    states, c = generator.normal(size=(40, 8)) * np.arange(1, 9), generator.uniform(size=40)
    found = weighted_ridge_difference(torch.tensor(states), torch.tensor(c), 0.7)
    yes, no = c >= 0.5, c < 0.5
    refusing, complying = np.average(states[yes], axis=0, weights=c[yes]), np.average(states[no], axis=0, weights=1 - c[no])
    sigma = np.cov(states[no].T, aweights=1 - c[no], ddof=0)
    np.testing.assert_allclose(found, np.linalg.solve(sigma + 0.7 * np.eye(8), refusing - complying), rtol=1e-10)
    huge = weighted_ridge_difference(torch.tensor(states), torch.tensor(c), 1e12)
    np.testing.assert_allclose(huge * 1e12, refusing - complying, rtol=1e-6)  # with all ridge, the mean difference


def test_layers_and_ridges_are_those_that_separate_the_calibration_prompts_best(backbone, steering):
    train, held = (last_states(backbone, rows).numpy() for rows in PROMPTS)
    c, c_held = (np.array([CONFIDENCE[p.id] for p in rows]) for rows in PROMPTS)
    best = []
    for layer in CONFIG.candidates:
        tried = []
        for ridge in CONFIG.ridges:
            v, gap = plain(train[:, layer], c, ridge)
            x, yes = held[:, layer] @ v, c_held >= 0.5
            pooled = np.sqrt((yes.sum() * x[yes].var() + (~yes).sum() * x[~yes].var()) / len(x))
            tried.append((roc_auc_score(yes, x), (x[yes].mean() - x[~yes].mean()) / pooled, layer, ridge, gap, v))
        best.append(max(tried, key=lambda t: t[:2]))
    best = sorted(best, key=lambda t: t[:2], reverse=True)[:2]
    assert [c.layer for c in steering.choices] == [t[2] for t in best] == list(steering.vectors)
    assert [c.ridge for c in steering.choices] == [t[3] for t in best]
    for choice, (auc, separation, layer, _, gap, v) in zip(steering.choices, best, strict=True):
        assert (choice.auc, choice.separation, choice.gap) == pytest.approx((auc, separation, gap), rel=1e-3)
        torch.testing.assert_close(
            steering.vectors[layer], torch.tensor(gap * v / 2, dtype=torch.float32), atol=1e-4, rtol=1e-3
        )


def test_the_edit_takes_refusal_away_by_the_strength_in_gaps(backbone, steering):
    first = min(steering.vectors)  # what a later layer adds does not reach this one
    batch = render_batch(backbone, PROMPTS[1])
    with record_residuals(backbone, [first]) as base:
        logits_of(backbone, batch)
    strength = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0, 1.0, 1.0, 1.0])
    with steering.editing(backbone, batch, strength), record_residuals(backbone, [first]) as edited:
        logits_of(backbone, batch)
    unit = steering.vectors[first] / steering.vectors[first].norm()
    gap = next(c.gap for c in steering.choices if c.layer == first)
    assert gap > 0
    moved = (edited[first] - base[first]) @ unit
    torch.testing.assert_close(moved, (-strength * gap / 2)[:, None].expand_as(moved), atol=1e-4, rtol=1e-4)


def test_defaults_choose_a_fifth_of_all_layers(backbone):
    assert len(fit_wrmd(backbone, material(), CONFIDENCE).vectors) == 2  # of six


def test_progress_counts_every_prompt(backbone):
    counted = []
    fit_wrmd(backbone, material(), CONFIDENCE, CONFIG, tick=counted.append)
    assert sum(counted) == sum(map(len, PROMPTS))


def test_confidences_that_are_missing_out_of_range_or_all_of_one_kind_are_said(backbone):
    missing = {i: c for i, c in CONFIDENCE.items() if i != "t-edit-3"}
    for wrong in (missing, CONFIDENCE | {"t-edit-3": 1.5}, CONFIDENCE | {"t-edit-3": float("nan")}):
        with pytest.raises(SteeringError, match=r"1 train prompts .* t-edit-3"):
            fit_wrmd(backbone, material(), wrong, CONFIG)
    with pytest.raises(SteeringError, match="answers all 8 calibration prompts"):
        fit_wrmd(backbone, material(), CONFIDENCE | {p.id: 0.1 for p in PROMPTS[1]}, CONFIG)
    with pytest.raises(SteeringError, match="do not differ"):
        weighted_ridge_difference(torch.ones(4, 3, dtype=torch.float64), torch.tensor([1.0, 1.0, 0, 0]).double(), 1.0)
    with pytest.raises(SteeringError, match="has no inverse"):
        weighted_ridge_difference(torch.eye(4).double(), torch.tensor([1.0, 1.0, 0, 0]).double(), 0.0)


def test_rows_are_edited_one_by_one(backbone, steering):
    holds_to_the_protocol(backbone, steering, scale=2.0)
    assert isinstance(steering, RefusalSteering)
