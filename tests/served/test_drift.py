"""The drift watch: quiet on prompts like calibration's, however calibration came out, and not on others."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paving.serving.drift import Drift


def test_prompts_like_the_calibrations_seldom_alarm_whatever_the_calibration_drew():
    rng = np.random.default_rng(0)
    alarmed = 0
    for _ in range(300):
        watch = Drift(rng.normal(size=60), window=200, alarm=0.01)
        for value in rng.normal(size=200):
            watch.seen(value)
        alarmed += watch.drifted
    assert alarmed / 300 <= 0.02  # 1 % is meant; a plain binomial with 5 % would alarm in a third of them


def test_prompts_from_elsewhere_alarm_and_the_alarm_ends_with_them():
    rng = np.random.default_rng(1)
    watch = Drift(rng.normal(size=100), window=200)
    for value in rng.normal(size=100):
        watch.seen(value)
    assert not watch.drifted
    for value in rng.normal(2.0, 1.0, size=200):
        watch.seen(value)
    assert watch.drifted and watch.n == 200
    for value in rng.normal(size=200):
        watch.seen(value)
    assert not watch.drifted


def test_a_handful_of_far_prompts_alarms_nobody():
    watch = Drift(range(1000))
    for i in range(29):
        watch.seen(1e9)
        assert watch.chance < 1e-6 or i < 5
    assert not watch.drifted
    watch.seen(1e9)
    assert watch.drifted


@given(st.lists(st.floats(-3, 3), min_size=19, max_size=50), st.lists(st.floats(-4, 4), max_size=80), st.integers(1, 30))
def test_what_is_counted_is_the_last_window(calibration, served, window):
    watch = Drift(calibration, window=window)
    far = [watch.seen(value) for value in served]
    assert watch.n == min(window, len(served)) and watch.far == sum(far[-window:])
    beyond = sorted(calibration)[len(calibration) - (len(calibration) + 1) // 20]
    assert far == [value >= beyond for value in served]


def test_what_is_no_number_is_far_and_too_little_calibration_is_said():
    assert Drift(range(40)).seen(math.nan) and Drift(range(40)).chance == 1.0
    with pytest.raises(ValueError, match="18 calibration prompts cannot show which 5% lie farthest; it takes 19"):
        Drift(range(18))
