"""Powers against sums over every outcome, a published sample-size formula, and the definitions themselves."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from paving.evaluation.paired import exact_p
from paving.evaluation.power import (
    BucketPower,
    bucket_power,
    critical_counts,
    detectable_drift,
    detectable_fall,
    drift_power,
    least_discordant,
    needed_for_drift,
    sentence,
)
from paving.prompts.types import Bucket


@pytest.mark.parametrize("n", [1, 6, 9, 14])
@pytest.mark.parametrize(("drift", "counter"), [(0.5, 0.0), (0.3, 0.1), (0.0, 0.2), (0.85, 0.05)])
def test_power_is_the_chance_of_all_outcomes_the_test_finds(n, drift, counter):
    """Every (lost, gained) of n prompts, weighted by its chance, with the p value that `paired_rates` reports."""
    chances = [drift + counter, counter, 1 - drift - 2 * counter]
    found = sum(
        stats.multinomial.pmf([lost, gained, n - lost - gained], n, chances)
        for lost, gained in itertools.product(range(n + 1), repeat=2)
        if lost + gained <= n and lost > gained and exact_p(lost, gained) <= 0.05
    )
    assert drift_power(n, drift, counter=counter) == pytest.approx(found, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.sampled_from([0.01, 0.05, 0.1]))
def test_the_critical_count_is_the_first_significant_one(m, alpha):
    critical = critical_counts(m, alpha)[m]
    significant = [x for x in range(m + 1) if 2 * x > m and exact_p(x, m - x) <= alpha]
    assert critical == (significant[0] if significant else m + 1)


def test_six_is_the_least_number_that_can_show_anything_at_five_percent():
    assert least_discordant(0.05) == 6 and least_discordant(0.01) == 8
    assert exact_p(6, 0) <= 0.05 < exact_p(5, 0)
    assert detectable_drift(5) is None and detectable_drift(0) is None
    # Six of six have to change: 0.8 to the power of one sixth.
    assert detectable_drift(6) == pytest.approx(0.8 ** (1 / 6))


@settings(max_examples=60, deadline=None)
@given(st.integers(6, 300), st.sampled_from([0.0, 0.02, 0.1]), st.sampled_from([0.5, 0.8, 0.95]))
def test_the_detectable_drift_has_the_power_and_a_smaller_one_less(n, counter, power):
    found = detectable_drift(n, counter=counter, power=power)
    if found is None:
        assert drift_power(n, 1 - 2 * counter, counter=counter) < power
        return
    assert drift_power(n, found, counter=counter) == pytest.approx(power, abs=1e-6)
    assert drift_power(n, 0.9 * found, counter=counter) < power


def test_more_prompts_show_smaller_drifts():
    drifts = [detectable_drift(n) for n in range(6, 120)]
    assert all(a > b for a, b in itertools.pairwise(drifts))
    # With changes both ways the exact test moves in steps; doubling the prompts is more than any of them.
    for counter in (0.02, 0.1):
        drifts = [detectable_drift(n, counter=counter) for n in (20, 40, 80, 160, 320)]
        assert all(a > b for a, b in itertools.pairwise(drifts))
    falls = [detectable_fall(n, 0.8) for n in (10, 40, 160, 640)]
    assert all(a > b for a, b in itertools.pairwise(falls))


def test_changes_against_the_drift_hide_it():
    drifts = [detectable_drift(60, counter=c) for c in (0.0, 0.02, 0.05, 0.1, 0.2)]
    assert all(a < b for a, b in itertools.pairwise(drifts))


@pytest.mark.parametrize(("drift", "counter"), [(0.1, 0.0), (0.2, 0.0), (0.1, 0.02), (0.05, 0.1), (1.0, 0.0)])
def test_the_needed_number_is_enough_and_one_less_is_not(drift, counter):
    n = needed_for_drift(drift, counter=counter)
    assert drift_power(n, drift, counter=counter) >= 0.8 > drift_power(n - 1, drift, counter=counter)
    assert detectable_drift(n, counter=counter) <= drift + 1e-9


def test_the_needed_number_is_near_the_normal_approximation():
    """0.1 of prompts change one way and 0.2 the other (Connor 1987; Duffy 1984). The exact test needs a little more."""
    p, psi, za, zb = 0.1, 2.0, 1.959964, 0.841621
    normal = (za * math.sqrt(psi + 1) + zb * math.sqrt(psi + 1 - (psi - 1) ** 2 * p)) ** 2 / (p * (psi - 1) ** 2)
    assert normal < needed_for_drift(0.1, counter=0.1) < 1.1 * normal


def test_a_drift_out_of_reach_is_said_to_be():
    assert needed_for_drift(0.00001) is None


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.floats(0, 1), st.sampled_from([0.5, 0.8]))
def test_a_detectable_fall_is_found_with_just_this_power(n, base, power):
    found = detectable_fall(n, base, power=power)
    rejected = [k for k in range(n + 1) if stats.binom.cdf(k, n, base) <= 0.025]
    if not rejected:
        assert found is None
        return
    assert 0 < found <= base
    assert stats.binom.cdf(rejected[-1], n, base - found) == pytest.approx(power, abs=1e-6)


def test_against_a_base_that_always_refuses_one_answer_is_enough():
    assert detectable_fall(29, 1.0) == pytest.approx(1 - 0.2 ** (1 / 29))


def test_a_simulated_drift_is_found_as_often_as_promised():
    rng = np.random.default_rng(0)
    n, counter = 60, 0.05
    drift = detectable_drift(n, counter=counter)
    outcomes = rng.multinomial(n, [drift + counter, counter, 1 - drift - 2 * counter], size=2000)
    found = sum(lost > gained and exact_p(int(lost), int(gained)) <= 0.05 for lost, gained, _ in outcomes)
    assert abs(found / 2000 - 0.8) < 0.03


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: detectable_drift(-1), "n=-1 prompts"),
        (lambda: detectable_drift(9, counter=0.5), "counter=0.5"),
        (lambda: detectable_drift(9, alpha=0.9), "alpha=0.9 and power=0.8"),
        (lambda: drift_power(9, 0.9, counter=0.1), "drift=0.9 with counter=0.1"),
        (lambda: needed_for_drift(0.0), "drift=0.0"),
        (lambda: needed_for_drift(0.9, counter=0.1), "drift=0.9"),
        (lambda: detectable_fall(9, 1.2), "base=1.2"),
    ],
)
def test_numbers_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_bucket_says_what_it_can_show():
    found = bucket_power(29, base=0.816)
    assert isinstance(found, BucketPower) and found.n == 29 and found.least == 6
    assert found.drift == pytest.approx(0.2589, abs=1e-4) and found.from_base == pytest.approx(0.2559, abs=1e-4)
    assert sentence(Bucket.HARMFUL_KEEP, found) == (
        "29 harmful keeps can show a drift of 26 pp or more; a smaller one would be missed more than 20 % of the time. "
        "A drift of 10 pp would take 78."
    )
    assert found.needed == needed_for_drift(0.10) == 78


def test_a_bucket_that_can_show_little_or_nothing_says_so():
    assert sentence(Bucket.EDIT, bucket_power(0)) == (
        "There are no edit prompts (n=0): nothing can be said about them. A drift of 10 pp would take 78."
    )
    assert sentence(Bucket.BENIGN_KEEP, bucket_power(1)) == (
        "1 benign keep can show nothing: even if every answer changed, chance could explain it "
        "(exact test, level 0.05). 6 could rule that out. A drift of 10 pp would take 78."
    )
    assert sentence(Bucket.EDIT, bucket_power(8, counter=0.2)) == (
        "8 edit prompts show no drift reliably, however large: with 20 % of answers changing the other way, any would "
        "be missed more than 20 % of the time. A drift of 10 pp would take 408."
    )


def test_a_bucket_that_shows_enough_asks_for_no_more_and_names_what_it_assumed():
    assert sentence(Bucket.HARMFUL_KEEP, bucket_power(98)) == (
        "98 harmful keeps can show a drift of 8 pp or more; a smaller one would be missed more than 20 % of the time."
    )
    assert "or more with 5 % of answers changing the other way; a smaller" in sentence(
        Bucket.EDIT, bucket_power(200, counter=0.05, power=0.9)
    )
    assert "more than 10 % of the time" in sentence(Bucket.EDIT, bucket_power(200, power=0.9))
    assert sentence(Bucket.EDIT, bucket_power(9, effect=0.00001)).endswith("would take more than 100000.")
