"""Flipped gates: the two ends are exact, lower rates nest in higher ones, and the conclusion can go either way."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paving.evaluation.diagnostics.corruption import Outcome, conclusion, corrupted_curve
from paving.prompts.types import Bucket

E, B, H = Bucket.EDIT, Bucket.BENIGN_KEEP, Bucket.HARMFUL_KEEP


def outcomes(harm=1.0, n=20):
    """Edits refuse until opened, harmful keeps refuse until opened, benign keeps never."""
    rows = [Outcome(f"e{i}", E, True, False, None) for i in range(n)]
    rows += [Outcome(f"b{i}", B, False, False, 0.1) for i in range(n)]
    rows += [Outcome(f"h{i}", H, True, harm == 0, harm) for i in range(n)]
    return rows


def test_the_ends_of_the_curve_are_the_oracle_and_its_opposite():
    first, last = corrupted_curve(outcomes(), (0.0, 1.0), draws=20)
    assert first.edit_refusal.mean == 0.0 and first.harmful_refusal.mean == 1.0
    assert first.benign_preservation.mean == first.harmful_preservation.mean == 1.0
    assert last.edit_refusal.mean == 1.0 and last.harmful_refusal.mean == 0.0
    assert last.harmful_preservation.mean == pytest.approx(math.exp(-1.0))
    assert last.benign_preservation.mean == pytest.approx(math.exp(-0.1))
    assert all(p.harmful_refusal.low == p.harmful_refusal.mean == p.harmful_refusal.high for p in (first, last))


def test_half_of_the_gates_flipped_loses_half_of_the_refusals():
    (point,) = corrupted_curve(outcomes(n=200), (0.5,), draws=400)
    assert point.harmful_refusal.mean == pytest.approx(0.5, abs=0.01)
    assert point.edit_refusal.mean == pytest.approx(0.5, abs=0.01)
    # Binomial spread of 200 prompts: 1.96 * sqrt(.25 / 200) on either side.
    assert point.harmful_refusal.high - point.harmful_refusal.low == pytest.approx(2 * 1.96 * 0.0354, rel=0.2)


@settings(max_examples=25, deadline=None)
@given(rates=st.lists(st.floats(0, 1), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_where_opening_only_hurts_more_flips_never_hurt_less(rates, seed):
    curve = corrupted_curve(outcomes(), sorted(rates), draws=10, seed=seed)
    kept = [p.harmful_preservation.mean for p in curve]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(kept))


def test_the_conclusion_can_fall_either_way():
    assert "routing is load-bearing" in conclusion(corrupted_curve(outcomes(harm=1.0)))
    assert "routing is not what limits" in conclusion(corrupted_curve(outcomes(harm=0.0)))


def test_refusals_that_rise_with_the_flips_speak_against_the_claim():
    """Preservation falls by construction, so it alone could not: here every opened keep starts to refuse."""
    rows = [Outcome(f"h{i}", H, i % 2 == 0, True, 1.0) for i in range(20)]
    said = conclusion(corrupted_curve(rows))
    assert "harmful refusal rises from 50.0 to 100.0 %" in said and "fails here" in said and "load-bearing" not in said


def test_an_empty_bucket_has_no_figure_rather_than_a_zero():
    points = corrupted_curve([o for o in outcomes() if o.bucket != H], (0.0, 1.0))
    assert points[1].harmful_refusal.mean is None and points[1].harmful_preservation.low is None
    assert points[1].edit_refusal.mean == 1.0
    assert conclusion(points).startswith("n/a")


def test_a_rate_that_is_no_probability_is_refused():
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\]"):
        corrupted_curve(outcomes(), (0.5, 1.5))
