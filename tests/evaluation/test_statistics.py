"""Rates, scores and router diagnostics against formulas and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paving.evaluation.results import OracleGaps, Rate, Row, Score
from paving.evaluation.routing import reliability, router_diagnostics, threshold_curve
from paving.evaluation.rows import oracle_gaps
from paving.evaluation.statistics import auc, control_score, preservation_score, wilson
from paving.prompts.types import Bucket

Z = 1.959963984540054
scores = st.lists(st.floats(-6, 6).map(lambda x: round(x, 1)), max_size=12)


@given(st.integers(1, 400), st.data())
def test_the_interval_is_wilsons(n, data):
    k = data.draw(st.integers(0, n))
    p = k / n
    centre = p + Z * Z / (2 * n)
    spread = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    rate = wilson(k, n)
    assert (rate.k, rate.n, rate.rate) == (k, n, p)
    assert rate.low == pytest.approx((centre - spread) / (1 + Z * Z / n), abs=1e-6)
    assert rate.high == pytest.approx((centre + spread) / (1 + Z * Z / n), abs=1e-6)
    assert 0 <= rate.low <= rate.rate <= rate.high <= 1


def test_a_rate_of_nothing_is_missing_and_not_zero():
    assert wilson(0, 0) == Rate(k=0, n=0, rate=None, low=None, high=None)


@pytest.mark.parametrize(("k", "n"), [(3, 2), (-1, 2), (1, 0)])
def test_an_impossible_rate_is_refused(k, n):
    with pytest.raises(ValueError, match=f"got k={k}, n={n}"):
        wilson(k, n)


@given(scores, scores)
def test_auc_is_the_share_of_pairs_ranked_right_with_ties_half(a, b):
    if not a or not b:
        assert auc(a, b) is None
        return
    pairs = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b)
    assert auc(a, b) == pytest.approx(pairs / (len(a) * len(b)))


def test_preservation_is_exp_of_minus_the_mean_divergence():
    assert preservation_score([0.1, 0.3]).value == pytest.approx(math.exp(-0.2))
    assert preservation_score([0.0, 0.0]) == Score(value=1.0, n=2)
    assert preservation_score([]) == Score(value=None, n=0)


def test_the_control_score_is_table_7s_and_missing_where_a_part_is():
    edit, harmful, base = wilson(10, 100), wilson(40, 50), wilson(50, 50)
    assert control_score(edit, Score(value=0.9, n=5), harmful, base) == pytest.approx(0.9 + 0.09 + 0.08)
    kept_more = control_score(edit, Score(value=1.0, n=5), wilson(50, 50), wilson(40, 50))
    assert kept_more == pytest.approx(0.9 + 0.2), "retention is clipped at 1"
    none = wilson(0, 0)
    assert control_score(none, Score(value=0.9, n=5), harmful, base) is None
    assert control_score(edit, Score(value=None, n=0), harmful, base) is None
    assert control_score(edit, Score(value=0.9, n=5), none, base) is None
    assert control_score(edit, Score(value=0.9, n=5), harmful, none) is None


@given(scores, scores, scores)
def test_the_routers_diagnostics_are_brute_force(edit, benign, harmful):
    logits = {"edit": edit, "benign_keep": benign, "harmful_keep": harmful}
    found = router_diagnostics(logits, {}, threshold=0.5, veto_threshold=None)
    rows = [(1 / (1 + math.exp(-a)), bucket == "edit") for bucket, values in logits.items() for a in values]
    assert found.auc_edit_vs_harmful == auc(edit, harmful) and found.auc_edit_vs_benign == auc(edit, benign)
    if not rows:
        assert found.brier is None and found.ece is None
        return
    assert found.brier == pytest.approx(sum((p - y) ** 2 for p, y in rows) / len(rows))
    bins: dict[int, list] = {}
    for p, y in rows:
        bins.setdefault(min(int(p * 10), 9), []).append((p, y))
    ece = 0.0
    for inside in bins.values():
        ece += abs(sum(p for p, _ in inside) - sum(y for _, y in inside)) / len(rows)
    assert found.ece == pytest.approx(ece, abs=1e-9)
    assert [b.n for b in found.reliability] == [len(bins.get(i, ())) for i in range(10)]
    assert sum(b.n for b in found.reliability) == len(rows)


def test_an_empty_bin_is_missing_and_the_ends_belong_to_the_outer_bins():
    bins = reliability(np.array([0.0, 1.0, 0.95]), np.array([0.0, 1.0, 0.0]))
    assert (bins[0].n, bins[9].n) == (1, 2)
    assert (bins[4].n, bins[4].mean_probability, bins[4].edit_share) == (0, None, None)
    assert bins[9].edit_share == 0.5


def test_extreme_logits_do_not_overflow():
    found = router_diagnostics({"edit": [900.0], "benign_keep": [-900.0], "harmful_keep": []}, {}, 0.0, None)
    assert (found.brier, found.auc_edit_vs_harmful) == (0.0, None)


@given(scores, scores)
def test_the_threshold_curve_counts_active_gates_from_all_to_none(edit, benign):
    curve = threshold_curve({"edit": edit, "benign_keep": benign, "harmful_keep": []})
    if not edit + benign:
        assert curve == []
        return
    for point in curve:
        assert point.active["harmful_keep"] is None
        for name, values in (("edit", edit), ("benign_keep", benign)):
            expected = sum(v > point.threshold for v in values) / len(values) if values else None
            assert point.active[name] == (None if expected is None else pytest.approx(expected))
    for name, values in (("edit", edit), ("benign_keep", benign)):
        if values:
            assert (curve[0].active[name], curve[-1].active[name]) == (1.0, 0.0)


def row(name: str, edit: Rate, benign: float | None, harmful: float | None) -> Row:
    none = wilson(0, 0)
    return Row(
        name=name, kind="learned", policy="soft", scale=1.0, harmful_drift=None, control_score=None, labels={},
        refusal={"edit": edit, "benign_keep": none, "harmful_keep": none},
        preservation={"benign_keep": Score(value=benign, n=9), "harmful_keep": Score(value=harmful, n=9)},
        gate_active={}, gate_mean={b.value: None for b in Bucket}, veto_rate={},
    )  # fmt: skip


def test_oracle_gaps_are_equation_7():
    rows = [row("learned", wilson(3, 10), 0.7, 0.6), row("oracle", wilson(1, 10), 1.0, 0.9)]
    gaps = oracle_gaps(rows, "learned")
    assert gaps.route_benign == pytest.approx(0.3)
    assert gaps.route_harmful == pytest.approx(0.3)
    assert gaps.edit == pytest.approx(0.2)


def test_oracle_gaps_are_missing_where_a_row_or_a_figure_is():
    learned = row("learned", wilson(0, 0), None, 0.6)
    missing = OracleGaps(route_benign=None, route_harmful=None, edit=None)
    assert oracle_gaps([learned], "learned") == missing
    assert oracle_gaps([], "learned") == missing
    gaps = oracle_gaps([learned, row("oracle", wilson(1, 10), 1.0, 0.9)], "learned")
    assert (gaps.route_benign, gaps.edit) == (None, None) and gaps.route_harmful == pytest.approx(0.3)
