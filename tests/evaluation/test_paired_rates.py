"""Paired comparisons against enumeration, the likelihood itself, and published examples."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from paving.evaluation.paired import (
    PairedRates,
    exact_p,
    from_counts,
    paired_by_bucket,
    paired_rates,
    score_interval,
)

Z = 1.959963984540054
verdicts = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=25)
small_counts = st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 30)).filter(lambda x: sum(x) > 0)


def two_rows(pairs):
    return {f"p{i}": a for i, (a, _) in enumerate(pairs)}, {f"p{i}": b for i, (_, b) in enumerate(pairs)}


@settings(max_examples=60, deadline=None)
@given(verdicts)
def test_the_counts_are_those_of_the_pairs(pairs):
    found = paired_rates(*two_rows(pairs))
    assert found.n == len(pairs)
    assert found.only_row == pairs.count((True, False)) and found.only_reference == pairs.count((False, True))
    if pairs:
        rates = [sum(x[side] for x in pairs) / len(pairs) for side in (0, 1)]
        assert found.difference == pytest.approx(rates[0] - rates[1])


@settings(max_examples=60, deadline=None)
@given(verdicts)
def test_swapping_the_rows_turns_the_sign_and_nothing_else(pairs):
    row, reference = two_rows(pairs)
    one, other = paired_rates(row, reference), paired_rates(reference, row)
    assert one.p == other.p
    if pairs:
        assert one.difference == -other.difference
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(verdicts)
def test_the_interval_holds_the_difference_and_p_is_a_probability(pairs):
    found = paired_rates(*two_rows(pairs))
    if pairs:
        assert -1 <= found.low <= found.difference <= found.high <= 1
        assert found.low < found.high, "no number of pairs makes a difference certain"
        assert 0 <= found.p <= 1


@settings(max_examples=60, deadline=None)
@given(verdicts, st.randoms(use_true_random=False))
def test_the_order_of_prompts_decides_nothing(pairs, random):
    row, reference = two_rows(pairs)
    ids = list(row)
    random.shuffle(ids)
    assert paired_rates({i: row[i] for i in ids}, reference) == paired_rates(row, reference)


def test_no_pairs_are_missing_and_not_zero():
    missing = PairedRates(n=0, only_row=0, only_reference=0, difference=None, low=None, high=None, p=None)
    assert paired_rates({}, {}) == missing


def test_pairs_that_all_agree_still_leave_a_difference_possible():
    found = from_counts(0, 0, 29)
    assert (found.difference, found.p) == (0.0, 1.0)
    assert found.high == pytest.approx(Z**2 / (29 + Z**2), abs=1e-6) and found.low == pytest.approx(-found.high)


@pytest.mark.parametrize("n", [1, 6, 29])
def test_pairs_that_all_changed_reach_the_end_of_the_scale(n):
    low, high = score_interval(n, 0, n)
    assert high == 1 and low < 1
    assert score_interval(0, n, n) == pytest.approx((-1, -low), abs=1e-7)


def test_rows_on_different_prompts_are_not_compared():
    with pytest.raises(ValueError, match=r"2 prompts have a value in one of the two rows only: a, c\."):
        paired_rates({"a": True, "b": True}, {"b": True, "c": False})


@pytest.mark.parametrize(("b", "c", "n"), [(-1, 0, 3), (2, 2, 3)])
def test_impossible_counts_are_refused(b, c, n):
    with pytest.raises(ValueError, match=f"do not fit into n={n}"):
        from_counts(b, c, n)


def test_buckets_are_compared_each_for_itself_also_empty_ones():
    row = {"e1": False, "e2": False, "h1": True}
    reference = {"e1": True, "e2": True, "h1": True}
    found = paired_by_bucket(row, reference, {"e1": "edit", "e2": "edit", "h1": "harmful_keep"})
    assert {b: (x.n, x.only_row, x.only_reference) for b, x in found.items()} == {
        "edit": (2, 0, 2), "benign_keep": (0, 0, 0), "harmful_keep": (1, 0, 0),
    }  # fmt: skip
    assert found["benign_keep"].p is None
    with pytest.raises(ValueError, match="3 prompts have no bucket"):
        paired_by_bucket(row, reference, {})


@pytest.mark.parametrize(("b", "c"), [(b, c) for b in range(6) for c in range(6)])
def test_p_is_the_share_of_sign_patterns_at_least_as_uneven(b, c):
    patterns = list(itertools.product((1, -1), repeat=b + c))
    uneven = sum(abs(sum(pattern)) >= abs(b - c) for pattern in patterns)
    assert exact_p(b, c) == pytest.approx(uneven / len(patterns))


def test_p_is_that_of_statsmodels():
    from statsmodels.stats import contingency_tables as tables  # here: it takes seconds to import

    for b, c in itertools.product((0, 1, 2, 7, 40), (1, 3, 18)):
        assert exact_p(b, c) == pytest.approx(tables.mcnemar([[5, b], [c, 5]], exact=True).pvalue, abs=1e-12)


@pytest.mark.parametrize(
    ("b", "c", "n", "low", "high"),
    [
        (1, 7, 21, -0.517, -0.026),  # Fagerland, Lydersen and Laake 2014, table V: airway hyper-responsiveness
        (6, 16, 161, -0.1240, -0.0054),  # the same authors' book, chapter 8: complete response to therapy
    ],
)
def test_the_interval_is_the_published_one(b, c, n, low, high):
    places = 3 if low == -0.517 else 4
    assert [round(x, places) for x in score_interval(b, c, n)] == [low, high]


@settings(max_examples=60, deadline=None)
@given(small_counts)
def test_at_its_limits_the_score_is_a_normal_quantile_away(counts):
    """With the nuisance share found by maximising the likelihood, not by the formula under test."""
    b, c, same = counts
    n = b + c + same
    for limit, sign in zip(score_interval(b, c, n), (1, -1), strict=True):
        if abs(limit) > 1 - 1e-6:
            continue
        share = likeliest_share(b, c, n, limit)
        variance = n * (2 * share + limit * (1 - limit))
        assert (b - c - n * limit) / math.sqrt(variance) == pytest.approx(sign * Z, abs=2e-3)


def likeliest_share(b: int, c: int, n: int, delta: float) -> float:
    """P(only the reference says yes) of the likeliest table whose rates differ by delta."""

    def loss(share: float) -> float:
        cells = ((b, share + delta), (c, share), (n - b - c, 1 - 2 * share - delta))
        return -sum(k * math.log(max(p, 1e-300)) for k, p in cells if k)

    low, high = max(0.0, -delta), (1 - delta) / 2
    return float(optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-10}).x)


@pytest.mark.parametrize(("b", "c"), [(0.0, 0.05), (0.02, 0.1), (0.05, 0.25), (0.1, 0.1), (0.02, 0.5)])
def test_the_interval_covers_as_often_as_it_says(b, c):
    """Exact: all tables of 20 pairs, weighted by their chance. A Wald interval covers (0, 0.05) 64 % of the time."""
    n, covered = 20, 0.0
    for i, j in itertools.product(range(n + 1), repeat=2):
        if i + j <= n:
            low, high = score_interval(i, j, n)
            if low <= b - c <= high:
                covered += stats.multinomial.pmf([i, j, n - i - j], n, [b, c, 1 - b - c])
    assert covered > 0.945
