"""Table 20's figures, each counted by hand on a few prompts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paving.evaluation.diagnostics.route_calibration import route_view, tied_thresholds, veto_curve, veto_point
from paving.prompts.types import Bucket

E, B, H = (b.value for b in Bucket)
GATES = {E: [0.9, 0.8, 0.0], B: [0.0, 0.0], H: [0.7, 0.0, 0.0]}


def test_a_route_is_scored_by_its_effective_gate():
    view = route_view("thresholded", GATES, scale=4.0)
    assert view.brier == pytest.approx((0.01 + 0.04 + 1.0 + 0.49) / 8)
    assert (view.accuracy.k, view.accuracy.n) == (6, 8)
    assert [view.active[b].k for b in (E, B, H)] == [2, 0, 1]
    assert view.strength[E] == pytest.approx(4 * 1.7 / 3) and view.strength[B] == 0.0
    # Bins: five closed gates of which one is an edit prompt (|0 - 1/5|), and one prompt each in 0.7, 0.8 and 0.9.
    assert view.ece == pytest.approx((5 * 0.2 + 0.7 + 0.2 + 0.1) / 8)
    assert view.vetoed is None


def test_a_soft_gate_is_active_above_its_threshold_only():
    raw = {E: [0.9, 0.4], B: [0.3], H: [0.6]}
    assert [route_view("raw", raw, scale=1.0, active_above=0.5).active[b].k for b in (E, B, H)] == [1, 0, 1]
    assert [route_view("raw", raw, scale=1.0).active[b].k for b in (E, B, H)] == [2, 1, 1]


def test_an_empty_bucket_has_no_share_and_no_strength():
    view = route_view("x", {E: [], B: [], H: [0.2]}, scale=1.0, vetoed={E: [], B: [], H: [True]})
    assert view.active[E].rate is None and view.strength[E] is None and view.vetoed[E].rate is None
    assert view.vetoed[H].rate == 1.0
    empty = route_view("x", {E: [], B: [], H: []}, scale=1.0)
    assert empty.brier is None and empty.ece is None and empty.accuracy.rate is None


def test_a_veto_point_counts_false_positives_and_recall():
    logits = {E: [-2.0, 0.5, -1.0], B: [-3.0], H: [2.0, -0.5]}
    point = veto_point("here", logits, 0.0)
    assert [point.vetoed[b].k for b in (E, B, H)] == [1, 0, 1]
    assert (point.accuracy.k, point.accuracy.n) == (4, 6)


def test_both_ends_of_the_tie_fit_the_training_prompts_alike():
    """Harmful at 1 and 5, others at -1 and 3: one error at best, with the threshold at 0 or at 4."""
    logits, harmful = [-1.0, 1.0, 3.0, 5.0], [False, True, False, True]
    assert tied_thresholds(logits, harmful) == (0.0, 4.0)
    assert tied_thresholds([0.0, 1.0], [False, True]) == (0.5, 0.5)
    assert tied_thresholds([], []) is None


@given(st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=1, max_size=12))
def test_no_threshold_beats_the_tie(rows):
    logits, harmful = [a for a, _ in rows], [h for _, h in rows]

    def accuracy(threshold):
        return sum((a > threshold) == h for a, h in rows) / len(rows)

    low, high = tied_thresholds(logits, harmful)
    assert low <= high and accuracy(low) == pytest.approx(accuracy(high))
    assert all(accuracy(low) >= accuracy(t) - 1e-9 for t in (*logits, min(logits) - 1, max(logits) + 1))


def test_the_curve_goes_from_every_prompt_vetoed_to_none():
    curve = veto_curve({E: [-1.0, 0.0], B: [-2.0], H: [1.0, 3.0]}, n_points=9)
    assert len(curve) == 9
    assert all(curve[0].vetoed[b].rate == 1.0 and curve[-1].vetoed[b].rate == 0.0 for b in (E, B, H))
    assert veto_curve({E: [], B: [], H: []}) == []
