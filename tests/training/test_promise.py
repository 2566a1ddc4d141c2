"""The promise: its arithmetic against brute force, its coverage by simulation, and what it says when it cannot be made."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from paving.training.promise import (
    PromiseError,
    allowed_openings,
    promise,
    read_promise,
    strictest,
    unit_scores,
    units_needed,
)

levels = st.floats(0.005, 0.5)


@given(st.integers(0, 400), levels, levels)
def test_the_allowed_openings_are_the_largest_that_keep_to_delta(n, alpha, delta):
    fitting = [k for k in range(n + 1) if binom.cdf(k, n, alpha) <= delta]
    assert allowed_openings(n, alpha, delta) == max(fitting, default=-1)


@given(levels, levels, st.integers(0, 5))
@example(0.49999999999999994, 0.25, 0)  # a hair's breadth below a half: two units do not do
def test_as_many_units_are_needed_as_allow_it_and_no_fewer(alpha, delta, opened):
    n = units_needed(alpha, delta, opened)
    assert allowed_openings(n, alpha, delta) >= opened > allowed_openings(n - 1, alpha, delta)
    if opened == 0:
        none_of, hair = [(1 - alpha) ** k for k in (n - 1, n)], delta * 1e-9
        assert none_of[0] > delta - hair and none_of[1] <= delta + hair


@given(st.integers(1, 40), st.integers(1, 40), levels, levels)
def test_of_the_next_prompts_the_count_is_that_of_all_orders(n, ahead, alpha, delta):
    """By counting orders: of n + m scores in random order, how often more than α·m of the m stand above the k + 1 highest
    of the n. Where x of the m stand there, the first k + x places hold k of the n, the next is one of the n."""

    def too_many(k: int) -> float:
        ways = [math.comb(x + k, k) * math.comb(n - k - 1 + ahead - x, ahead - x) for x in range(ahead + 1)]
        return sum(w for x, w in enumerate(ways) if x > alpha * ahead + 1e-9) / math.comb(n + ahead, ahead)

    fitting = [k for k in range(n) if too_many(k) <= delta - 1e-12]
    found = allowed_openings(n, alpha, delta, ahead=ahead)
    assert found in (max(fitting, default=-1), max([k for k in range(n) if too_many(k) <= delta + 1e-12], default=-1))


@settings(deadline=None)
@given(levels, levels, st.integers(1, 60))
def test_of_ever_more_prompts_to_come_the_promise_is_that_of_all(alpha, delta, ahead):
    needed = units_needed(alpha, delta, ahead=ahead)
    assert allowed_openings(needed, alpha, delta, ahead=ahead) >= 0 > allowed_openings(needed - 1, alpha, delta, ahead=ahead)
    assert units_needed(alpha, delta, ahead=20_000) == pytest.approx(units_needed(alpha, delta), rel=0.1, abs=1)


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=200), levels, levels)
def test_at_the_threshold_no_more_open_than_may_and_below_it_more_would(scores, alpha, delta):
    found = promise(scores, bucket="harmful_keep", alpha=alpha, delta=delta)
    if found.threshold is None:
        assert found.allowed == -1 and found.missing == units_needed(alpha, delta) - len(scores) > 0
        return
    assert found.opened == sum(s > found.threshold for s in scores) <= found.allowed and found.missing == 0
    assert sum(s >= found.threshold for s in scores) > found.allowed  # any lower, and one too many would open


@pytest.mark.parametrize("n, alpha, delta", [(120, 0.05, 0.1), (300, 0.02, 0.05)])
def test_the_share_of_draws_on_which_the_promise_fails_is_at_most_delta(n, alpha, delta):
    rng = np.random.default_rng(0)
    failed = 0
    draws = 3000
    for _ in range(draws):
        found = promise(rng.random(n), bucket="harmful_keep", alpha=alpha, delta=delta)
        failed += 1 - found.threshold > alpha  # uniform scores: the rate above a threshold is known
    exact = binom.cdf(allowed_openings(n, alpha, delta), n, alpha)
    assert exact <= delta
    assert failed / draws == pytest.approx(exact, abs=4 * math.sqrt(delta * (1 - delta) / draws))


def test_a_group_counts_once_by_its_highest_score():
    scores, groups = [0.1, 0.9, 0.4, 0.3, 0.8], ["a", "a", "b", "c", "c"]
    assert unit_scores(scores, groups).tolist() == [0.9, 0.4, 0.8]
    found = promise(scores, bucket="harmful_keep", alpha=0.5, delta=0.5, groups=groups)
    assert (found.n, found.prompts, found.allowed) == (3, 5, 1) and found.threshold == 0.8 and found.opened == 1
    assert (
        "3 groups (5 prompts)" in found.sentence()
        and "groups of harmful_keep prompts hold one that opens" in found.sentence()
    )


def test_the_sentence_says_what_is_promised_or_what_is_missing():
    made = promise(range(300), bucket="harmful_keep", alpha=0.02, delta=0.05)
    assert made.sentence() == (
        "At most 2% of harmful_keep prompts open the gate, with confidence 95%, drawn like the 300 prompts of "
        f"calibration, {made.opened} of which do ({made.allowed} may)."
    )
    of_next = promise(range(300), bucket="harmful_keep", alpha=0.05, delta=0.05, ahead=100)
    assert of_next.sentence().startswith("At most 5% of the next 100 harmful_keep prompts open the gate")
    short = promise(range(100), bucket="harmful_keep", alpha=0.02, delta=0.05)
    assert short.missing == 49 and "No promise" in short.sentence() and "49 more prompts are needed" in short.sentence()
    assert strictest([made, short]) is None and strictest([made]) == made.threshold and strictest([]) is None


def test_ties_never_open_too_many():
    found = promise([1.0] * 50 + [0.0] * 50, bucket="harmful_keep", alpha=0.1, delta=0.1)
    assert found.threshold == 1.0 and found.opened == 0


@pytest.mark.parametrize("alpha, delta", [(0, 0.1), (0.1, 1), (float("nan"), 0.1)])
def test_levels_outside_their_range_are_refused(alpha, delta):
    with pytest.raises(ValueError, match="between 0 and 1"):
        promise([1.0], bucket="edit", alpha=alpha, delta=delta)


def test_scores_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="1 of 2 scores are not finite"):
        promise([1.0, float("nan")], bucket="edit", alpha=0.1, delta=0.1)
    with pytest.raises(ValueError, match="2 scores and 1 groups"):
        promise([1.0, 2.0], bucket="edit", alpha=0.1, delta=0.1, groups=["a"])


def test_a_command_line_says_what_is_promised():
    assert read_promise("0.05") == {"harmful": 0.05}
    assert read_promise("0.05,benign=0.02, delta=0.2") == {"harmful": 0.05, "benign": 0.02, "delta": 0.2}
    assert read_promise("benign=0.02,ahead=200") == {"benign": 0.02, "ahead": 200, "harmful": None}


@pytest.mark.parametrize("text", ["", "often", "harmful=", "0.05,harmful=0.02", "edit=0.05", "ahead=1.5", "0.05,,"])
def test_what_is_no_promise_is_one_clear_error(text):
    with pytest.raises(PromiseError, match=r"is no promise. Write 0.05, or any of harmful, benign, delta, ahead once"):
        read_promise(text)
