"""Intervals by group against enumeration, an ordinary bootstrap, and how often they cover."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from paving.evaluation import resampling
from paving.evaluation.paired import paired_rates
from paving.evaluation.resampling import (
    Resampled,
    by_group,
    effective_n,
    expanded_tail,
    grouped_pair,
    grouped_rate,
    mean,
    oracle_gap_intervals,
    preservation_difference,
    preservation_interval,
    rate_difference,
    rate_interval,
    score,
)
from paving.evaluation.statistics import preservation_score, wilson

divergences = st.lists(st.tuples(st.floats(0, 3), st.floats(0, 3), st.integers(0, 4)), min_size=1, max_size=20)
flags = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 4)), min_size=1, max_size=20)


def columns(rows):
    """Two mappings id -> value, and id -> group."""
    ids = [f"p{i}" for i in range(len(rows))]
    return *({i: row[side] for i, row in zip(ids, rows, strict=True)} for side in (0, 1)), {
        i: f"g{row[2]}" for i, row in zip(ids, rows, strict=True)
    }


@settings(max_examples=30, deadline=None)
@given(divergences)
def test_the_value_is_the_score_itself_and_lies_in_its_interval(rows):
    one, _, groups = columns(rows)
    found = preservation_interval(one, groups)
    assert found.value == pytest.approx(preservation_score(list(one.values())).value)
    assert (found.n, found.groups) == (len(rows), len(set(groups.values())))
    if found.groups == 1:
        assert (found.low, found.high, found.se) == (None, None, None), "one group gives no interval, not a narrow one"
    else:
        assert found.low - 1e-12 <= found.value <= found.high + 1e-12


@settings(max_examples=30, deadline=None)
@given(divergences)
def test_swapping_the_rows_of_a_difference_turns_its_sign(rows):
    one, other, groups = columns(rows)
    there, back = preservation_difference(one, other, groups), preservation_difference(other, one, groups)
    assert there.value == pytest.approx(-back.value)
    if there.low is not None:
        assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
        assert there.low - 1e-12 <= there.value <= there.high + 1e-12


@settings(max_examples=30, deadline=None)
@given(flags)
def test_swapping_the_rows_of_a_rate_difference_turns_its_sign(rows):
    one, other, groups = columns(rows)
    there, back = rate_difference(one, other, groups), rate_difference(other, one, groups)
    assert there.value == pytest.approx(-back.value)
    if there.low is not None:
        assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-7)
        assert -1 <= there.low <= there.value + 1e-9 and there.value <= there.high + 1e-9 <= 1 + 2e-9


@settings(max_examples=30, deadline=None)
@given(flags)
def test_a_rate_lies_in_its_interval_which_is_never_narrower_than_wilsons(rows):
    one, _, groups = columns(rows)
    found, plain = rate_interval(one, groups), wilson(sum(one.values()), len(one))
    assert found.value == pytest.approx(plain.rate)
    if found.low is not None:
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.high - found.low >= plain.high - plain.low - 1e-9


@settings(max_examples=30, deadline=None)
@given(divergences, st.randoms(use_true_random=False))
def test_the_order_of_prompts_decides_nothing(rows, random):
    one, other, groups = columns(rows)
    ids = list(one)
    random.shuffle(ids)
    shuffled = {i: one[i] for i in ids}
    assert preservation_interval(shuffled, groups) == preservation_interval(one, groups)
    assert preservation_difference(shuffled, other, groups) == preservation_difference(one, other, groups)


def test_the_same_seed_gives_the_same_interval_and_another_nearly_so():
    values = {f"p{i}": 0.1 * i for i in range(30)}
    groups = {i: i for i in values}
    first, again, other = (preservation_interval(values, groups, seed=s) for s in (3, 3, 4))
    assert first == again
    assert first.low != other.low and abs(first.low - other.low) < 0.1 * (first.high - first.low)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3])
def test_equal_values_leave_the_score_no_room(value):
    found = preservation_interval({f"p{i}": value for i in range(7)}, {f"p{i}": f"g{i % 3}" for i in range(7)})
    assert found.low == found.value == found.high == pytest.approx(math.exp(-value)) and found.se == 0


def test_no_prompts_are_missing_and_not_zero():
    missing = Resampled(value=None, low=None, high=None, se=None, n=0, groups=0)
    assert preservation_interval({}, {}) == missing
    assert preservation_difference({}, {}, {}) == rate_difference({}, {}, {}) == rate_interval({}, {}) == missing


@pytest.mark.parametrize(
    ("one", "other", "groups", "message"),
    [
        ({"a": 0.1}, {"b": 0.1}, {"a": "g", "b": "g"}, "2 prompts have a value in one of the two rows only: a, b"),
        ({"a": 0.1}, {"a": 0.1}, {}, "1 prompts have no group: a"),
        ({"a": math.nan}, {"a": 0.1}, {"a": "g"}, "1 prompts have a value that is not finite: a"),
        ({"a": 0.1}, {"a": math.inf}, {"a": "g"}, "1 prompts have a value that is not finite: a"),
    ],
)
def test_what_cannot_be_compared_is_named(one, other, groups, message):
    with pytest.raises(ValueError, match=message):
        preservation_difference(one, other, groups)


def test_the_interval_is_that_of_all_redrawings_of_the_groups():
    """Four groups of unequal size: all 256 ways to draw four of them, instead of a sample of those."""
    values = {"a": 0.0, "b": 0.2, "c": 0.2, "d": 1.0, "e": 0.6, "f": 0.1}
    groups = {"a": "u", "b": "u", "c": "v", "d": "w", "e": "w", "f": "x"}
    members = {g: [values[i] for i in values if groups[i] == g] for g in "uvwx"}
    means = [np.mean([v for g in drawn for v in members[g]]) for drawn in itertools.product("uvwx", repeat=4)]
    found = by_group([values], groups, mean, resamples=40_000)
    tail = expanded_tail(4)
    assert found.low == pytest.approx(np.quantile(means, tail), abs=0.01)
    assert found.high == pytest.approx(np.quantile(means, 1 - tail), abs=0.01)
    assert found.se == pytest.approx(np.std(means), rel=0.02)


def test_single_prompts_as_groups_are_the_ordinary_bootstrap():
    data = np.random.default_rng(5).exponential(0.3, 40)
    values = {f"p{i}": v for i, v in enumerate(data)}
    found = by_group([values], {i: i for i in values}, mean, resamples=20_000)
    ordinary = stats.bootstrap(
        (data,), np.mean, n_resamples=20_000, confidence_level=1 - 2 * expanded_tail(40), method="percentile", rng=1
    )
    width = found.high - found.low
    assert found.low == pytest.approx(ordinary.confidence_interval.low, abs=0.03 * width)
    assert found.high == pytest.approx(ordinary.confidence_interval.high, abs=0.03 * width)
    assert found.se == pytest.approx(ordinary.standard_error, rel=0.03)


def test_drawing_in_chunks_draws_the_same(monkeypatch):
    values = {f"p{i}": float(i % 7) for i in range(40)}
    groups = {i: f"g{int(i[1:]) % 11}" for i in values}
    whole = by_group([values], groups, mean, resamples=1000)
    monkeypatch.setattr(resampling, "CHUNK", 11 * 300)  # four chunks, the last one smaller
    assert by_group([values], groups, mean, resamples=1000) == whole


def test_few_groups_widen_the_interval_and_many_do_not():
    tails = [expanded_tail(g) for g in (2, 5, 9, 30, 1000)]
    assert tails == sorted(tails) and tails[0] < 1e-12
    assert tails[-1] == pytest.approx(0.025, abs=3e-4)


def test_limits_of_a_score_are_those_of_the_mean_divergence_turned_round():
    rng = np.random.default_rng(2)
    values = {f"p{i}": float(v) for i, v in enumerate(rng.exponential(0.2, 25))}
    groups = {i: f"g{int(i[1:]) % 8}" for i in values}
    kl = by_group([values], groups, mean)
    found = by_group([values], groups, score)
    assert (found.low, found.high) == pytest.approx((math.exp(-kl.high), math.exp(-kl.low)), rel=1e-3)


def test_copies_of_a_prompt_count_as_one_prompt():
    base = {f"p{i}": i < 7 for i in range(30)}
    copies = {f"{i}-{k}": v for i, v in base.items() for k in range(4)}
    found = rate_interval(copies, {i: i.split("-")[0] for i in copies})
    plain = wilson(7, 30)
    assert found.n == 120 and found.groups == 30
    # Somewhat wider, for the spread is measured here, from 30 groups: n - 1, and the t quantile for the normal one.
    assert 0.9 < (plain.high - plain.low) / (found.high - found.low) < 1
    assert wilson(28, 120).low > found.low


def test_rates_of_prompts_without_company_have_the_plain_intervals():
    row, reference = {f"p{i}": i < 3 for i in range(40)}, {f"p{i}": i < 10 for i in range(40)}
    alone = {i: i for i in row}
    rate, difference = rate_interval(row, alone), rate_difference(row, reference, alone)
    plain, paired = wilson(3, 40), paired_rates(row, reference)
    assert (rate.value, rate.low, rate.high) == pytest.approx((plain.rate, plain.low, plain.high))
    assert (difference.value, difference.low, difference.high) == pytest.approx((paired.difference, paired.low, paired.high))


@settings(max_examples=30, deadline=None)
@given(flags)
def test_a_tables_figures_keep_their_counts_and_widen_where_prompts_share_groups(rows):
    one, other, groups = columns(rows)
    plain, found = wilson(sum(one.values()), len(one)), grouped_rate(one, groups)
    assert (found.k, found.n, found.rate) == (plain.k, plain.n, plain.rate)
    assert found.low <= plain.low + 1e-9 and found.high >= plain.high - 1e-9
    paired, pair = paired_rates(one, other), grouped_pair(one, other, groups)
    assert (pair.only_row, pair.only_reference, pair.difference, pair.p) == (
        paired.only_row, paired.only_reference, paired.difference, paired.p,
    )  # fmt: skip
    assert -1 - 1e-9 <= pair.low <= pair.difference <= pair.high <= 1 + 1e-9
    if len(set(groups.values())) == len(groups):
        assert found == plain and pair == paired


def test_ten_prompts_of_one_group_are_one_answer():
    refused = dict.fromkeys(map(str, range(10)), True)
    found = grouped_rate(refused, dict.fromkeys(refused, "kill"))
    assert (found.k, found.n) == (10, 10) and found.low == pytest.approx(wilson(1, 1).low)
    assert grouped_rate({}, {}) == wilson(0, 0) and grouped_pair({}, {}, {}).n == 0


def test_no_refusal_at_all_is_worth_as_many_answers_as_there_are_groups_at_most():
    never = {f"p{i}": False for i in range(36)}
    found = rate_interval(never, {i: f"g{int(i[1:]) % 9}" for i in never})
    assert found.value == found.low == 0 and found.high > wilson(0, 9).high
    same = rate_difference(never, never, {i: f"g{int(i[1:]) % 9}" for i in never})
    assert same.value == 0 and same.high == pytest.approx(-same.low) and same.high > 0.3


def test_a_spread_below_the_binomial_one_makes_no_more_of_the_answers():
    even = {f"p{i}": i % 2 == 0 for i in range(40)}
    pairs = {i: f"g{int(i[1:]) // 2}" for i in even}  # one yes and one no in every group
    found = by_group([even], pairs, mean)
    assert found.se == pytest.approx(0, abs=1e-12) and effective_n(found, 0.25 / 40) <= 40


def test_oracle_gaps_are_equation_7_bucket_by_bucket():
    ids = {b: [f"{b}{i}" for i in range(12)] for b in ("edit", "benign_keep", "harmful_keep")}
    buckets = {i: b for b, members in ids.items() for i in members}
    groups = {i: i for i in buckets}
    keeps = ids["benign_keep"] + ids["harmful_keep"]
    learned = {i: 0.1 + 0.02 * n for n, i in enumerate(keeps)}
    oracle = dict.fromkeys(keeps, 0.0)
    refused = {i: n < 5 for n, i in enumerate(ids["edit"])}, {i: n < 1 for n, i in enumerate(ids["edit"])}
    gaps = oracle_gap_intervals((learned, oracle), refused, buckets, groups)
    for gap, bucket in ((gaps.route_benign, "benign_keep"), (gaps.route_harmful, "harmful_keep")):
        lost = 1 - preservation_score([learned[i] for i in ids[bucket]]).value
        assert gap.value == pytest.approx(lost) and 0 < gap.low < gap.value < gap.high and gap.n == 12
    assert gaps.edit.value == pytest.approx(4 / 12) and gaps.edit.n == 12
    empty = oracle_gap_intervals(({}, {}), ({}, {}), {}, {})
    assert empty.edit.value is None and empty.route_benign.n == 0


def correlated(rng: np.random.Generator, n_groups: int) -> tuple[dict[str, float], dict[str, str]]:
    """Groups of one to four values that share most of their deviation from 0.3."""
    values, groups = {}, {}
    for g in range(n_groups):
        shared = 0.1 * rng.standard_normal()
        for k in range(rng.integers(1, 5)):
            values[f"{g}-{k}"] = 0.3 + shared + 0.03 * rng.standard_normal()
            groups[f"{g}-{k}"] = f"g{g}"
    return values, groups


@pytest.mark.parametrize("n_groups", [6, 20])
def test_nineteen_of_twenty_intervals_cover_where_prompts_hang_together(n_groups):
    rng = np.random.default_rng(n_groups)
    covered = alone = 0
    for _ in range(300):
        values, groups = correlated(rng, n_groups)
        found = by_group([values], groups, mean, resamples=1000)
        naive = by_group([values], {i: i for i in values}, mean, resamples=1000)
        covered += found.low <= 0.3 <= found.high
        alone += naive.low <= 0.3 <= naive.high
    # 0.95 covers at least 273 of 300 with a chance of 0.999.
    assert covered >= 273
    assert alone < 260, "drawing prompts by themselves has to fail here, or the test shows nothing"


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.integers(1, 6))
def test_equal_groups_that_agree_within_are_worth_less_than_their_number(n_groups, size):
    values = {f"{g}-{k}": g % 2 == 0 for g in range(n_groups) for k in range(size)}
    groups = {i: i.split("-")[0] for i in values}
    found = by_group([values], groups, mean, resamples=2000)
    p = found.value
    n = effective_n(found, p * (1 - p) / found.n)
    assert n <= found.n + 1e-9
    if size > 1 and n_groups > 5:
        assert n < 1.1 * n_groups
