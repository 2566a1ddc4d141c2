"""Seeds summarised and pooled, against arithmetic, repeats made on purpose, and the paper's own table."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paving.evaluation.paired import from_counts
from paving.evaluation.seeds import SignTest, Spread, pooled_difference, pooled_rate, pooled_score, sign_test, spread
from paving.evaluation.statistics import wilson

figures = st.lists(st.none() | st.floats(-1, 1), max_size=6)
gains = st.lists(st.none() | st.integers(-3, 3).map(float), max_size=12)

# Residual Paving, table 3: keep-side gain in percentage points, six backbones.
TABLE_3 = (20.8, 50.7, 9.9, 15.9, 4.9, 4.6)


@settings(max_examples=60, deadline=None)
@given(figures)
def test_a_spread_is_textbook_arithmetic_over_the_seeds_that_have_the_figure(values):
    found = spread(values)
    known = [v for v in values if v is not None]
    assert found.seeds == values and found.n == len(known)
    if not known:
        assert (found.mean, found.least, found.greatest, found.sd) == (None, None, None, None)
        return
    assert found.least == min(known) and found.greatest == max(known)
    assert found.mean == pytest.approx(sum(known) / len(known))
    if len(known) == 1:
        assert found.sd is None, "one seed has no spread, not one of 0"
    else:
        squares = sum((v - found.mean) ** 2 for v in known)
        assert found.sd == pytest.approx(math.sqrt(squares / (len(known) - 1)), abs=1e-9)


def test_the_paper_s_three_seeds():
    assert spread([0.079, 0.053, 0.105]).mean == pytest.approx(0.079)
    assert spread([0.079, 0.053, 0.105]).sd == pytest.approx(0.026)


def test_seeds_with_prompts_of_their_own_pool_as_wilson_has_it():
    runs = [{f"{s}-{i}": i < 3 for i in range(20)} for s in range(3)]
    found = pooled_rate(runs)
    assert found.naive == wilson(9, 60) and (found.prompts, found.repeated) == (60, 0)
    assert (found.by_prompt.low, found.by_prompt.high) == pytest.approx((found.naive.low, found.naive.high))
    assert found.seeds == spread([0.15, 0.15, 0.15])


def test_repeats_of_a_prompt_are_not_counted_as_prompts():
    run = {f"p{i}": i < 12 for i in range(40)}
    once, thrice = pooled_rate([run]), pooled_rate([run, run, run])
    assert (thrice.prompts, thrice.repeated, thrice.naive.n) == (40, 40, 120)
    assert thrice.by_prompt.value == once.by_prompt.value == 0.3
    naive, honest = thrice.naive.high - thrice.naive.low, thrice.by_prompt.high - thrice.by_prompt.low
    alone = once.naive.high - once.naive.low
    assert naive < 0.65 * alone < alone < honest < 1.1 * alone


def test_a_pooled_difference_takes_the_pairs_of_every_seed():
    reference = [{f"p{i}": True for i in range(s, s + 20)} for s in range(3)]
    row = [{i: int(i[1:]) % 4 != 0 for i in run} for run in reference]
    found = pooled_difference(row, reference)
    assert found.naive == from_counts(0, 15, 60) and found.seeds.seeds == [-0.25, -0.25, -0.25]
    assert (found.prompts, found.repeated) == (22, 20)
    assert found.by_prompt.low < found.naive.low < -0.25 < found.naive.high < found.by_prompt.high
    with pytest.raises(ValueError, match="2 runs of the row and 3"):
        pooled_difference(row[:2], reference)
    with pytest.raises(ValueError, match="in one of the two rows only"):
        pooled_difference(row, [reference[0]] * 3)


def test_rows_that_never_differ_still_leave_room_for_a_difference():
    runs = [{f"p{i}": True for i in range(36)}] * 3
    found = pooled_difference(runs, runs)
    assert found.by_prompt.value == 0 and found.by_prompt.high > from_counts(0, 0, 36).high > found.naive.high
    assert found.by_prompt.low == pytest.approx(-found.by_prompt.high)


def test_a_pooled_score_is_that_of_all_answers_and_repeats_widen_it():
    rng = np.random.default_rng(1)
    run = {f"p{i}": float(v) for i, v in enumerate(rng.exponential(0.2, 30))}
    found = pooled_score([run, run, {}])
    assert found.by_prompt.value == pytest.approx(math.exp(-statistics.fmean(run.values())))
    assert found.seeds.n == 2 and found.seeds.seeds[2] is None
    assert found.by_prompt.high - found.by_prompt.low > 1.2 * (found.naive.high - found.naive.low)


def test_groups_of_prompts_are_redrawn_together():
    runs = [{f"p{i}": i // 10 % 2 == 0 for i in range(40)} for _ in range(2)]
    alone, together = pooled_rate(runs), pooled_rate(runs, {f"p{i}": f"word{i // 10}" for i in range(40)})
    assert (alone.by_prompt.groups, together.by_prompt.groups) == (40, 4)
    assert together.by_prompt.high - together.by_prompt.low > 1.5 * (alone.by_prompt.high - alone.by_prompt.low)
    with pytest.raises(ValueError, match="40 prompts have no group"):
        pooled_rate(runs, {})


@pytest.mark.parametrize("runs", [[], [{}], [{}, {}]])
def test_no_answers_are_missing_and_not_zero(runs):
    rate, difference, score = pooled_rate(runs), pooled_difference(runs, runs), pooled_score(runs)
    for found in (rate, difference, score):
        assert found.by_prompt.value is None and found.by_prompt.n == 0
        assert found.seeds == Spread(seeds=[None] * len(runs), n=0, mean=None, least=None, greatest=None, sd=None)
        assert (found.prompts, found.repeated, found.naive.n) == (0, 0, 0)
    assert rate.naive.rate is None and difference.naive.p is None and score.naive.value is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abcdefgh"), st.booleans()), max_size=4), st.randoms())
def test_the_order_of_prompts_and_repeats_decides_nothing(runs, random):
    shuffled = []
    for run in runs:
        ids = list(run)
        random.shuffle(ids)
        shuffled.append({i: run[i] for i in ids})
    assert pooled_rate(shuffled) == pooled_rate(runs)


def test_intervals_by_prompt_cover_where_naive_ones_do_not():
    """Prompts that are refused always or never, three seeds of 35 out of 60 each."""
    rng = np.random.default_rng(11)
    naive = by_prompt = 0
    for _ in range(200):
        always = {f"p{i}": bool(rng.random() < 0.4) for i in range(60)}
        runs = [{i: always[i] for i in rng.choice(list(always), 35, replace=False)} for _ in range(3)]
        found = pooled_rate(runs)
        naive += found.naive.low <= 0.4 <= found.naive.high
        by_prompt += found.by_prompt.low <= 0.4 <= found.by_prompt.high
    # 0.95 covers at least 180 of 200 with a chance of 0.999.
    assert by_prompt >= 180
    assert naive < 175, "repeats have to matter here, or the test shows nothing"


def test_the_sign_test_is_the_papers():
    found = sign_test(TABLE_3)
    assert found.p == (1 / 2) ** 6 and found.median == pytest.approx(12.9)
    assert (found.positive, found.negative, found.ties, found.missing) == (6, 0, 0, 0)


@settings(max_examples=60, deadline=None)
@given(gains)
def test_the_sign_test_counts_coin_tosses_and_reports_what_it_drops(values):
    found = sign_test(values)
    assert found.positive + found.negative + found.ties + found.missing == len(values)
    assert found.ties == values.count(0.0) and found.missing == values.count(None)
    m = found.positive + found.negative
    if m == 0:
        assert found.p is None
        return
    assert found.p == pytest.approx(sum(math.comb(m, k) for k in range(found.positive, m + 1)) / 2**m)
    mirrored = sign_test([None if v is None else -v for v in values])
    assert found.p + mirrored.p == pytest.approx(1 + math.comb(m, found.positive) / 2**m)


def test_no_gains_decide_nothing():
    assert sign_test([]) == SignTest(positive=0, negative=0, ties=0, missing=0, median=None, p=None)
    assert sign_test([0.0, None]) == SignTest(positive=0, negative=0, ties=1, missing=1, median=0.0, p=None)
    with pytest.raises(ValueError, match="NaN"):
        sign_test([0.1, math.nan])
