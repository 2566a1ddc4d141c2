"""What a server counts: one request once, a repeated prompt once, a veto where it closed something."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these in an environment of its own")

from paving.controller import Hard, Reference
from paving.serving.answers import _first_of
from paving.serving.metrics import Watch
from paving.serving.told import Told
from tiny_models import lively, tiny_backbone


@pytest.fixture
def watch():
    calibration = tuple(i / 100 for i in range(100))
    reference = Reference((0.0,) * 30, (0.0,) * 30, (0.0,) * 30, boundary=calibration)
    return Watch(replace(lively(tiny_backbone()).with_policy(Hard(1.0)), reference=reference))


def value(counter) -> float:
    return counter._value.get()


def test_a_repeated_prompt_says_nothing_new_of_drift(watch):
    far = Told("hard", gate=0.0, logit=-1.0, boundary=9.0)
    for _ in range(100):
        watch.count(far, prompt=(1, 2, 3))
    assert watch.drift.n == 1 and not watch.drift.drifted
    for i in range(60):
        watch.count(far, prompt=(i,))
    assert watch.drift.n == 61 and watch.drift.drifted and value(watch.meters.drifted) == 1


def test_a_veto_counts_where_it_closed_what_would_have_opened(watch):
    before = value(watch.meters.vetoes)
    watch.count(Told("hard", gate=0.0, logit=0.5, veto=True))  # below the threshold of 1
    assert value(watch.meters.vetoes) == before
    watch.count(Told("hard", gate=0.0, logit=1.5, veto=True))
    watch.count(Told("soft", gate=0.0, logit=-3.0, veto=True))
    assert value(watch.meters.vetoes) == before + 2


def test_samples_of_one_request_are_one():
    parent = SimpleNamespace()
    assert [_first_of(parent), _first_of(parent), _first_of(None), _first_of(None)] == [True, False, True, True]
