"""The throughput script's completions: no two alike, of realistic lengths and all kinds. No time is asserted."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

from paving.evaluation.judges import Label, RuleJudge
from paving.prompts.types import Bucket

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "judge_throughput.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("judge_throughput", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_made_completions_are_distinct_realistic_and_mixed(bench):
    rows = list(bench.completions(600))
    assert len({(r["prompt"], r["response"]) for r in rows}) == 600, "equal ones would be judged once only"
    lengths = sorted(len(r["response"]) for r in rows)
    assert lengths[0] > 30 and lengths[-1] < 6000 and 200 < lengths[300] < 1500
    judge = RuleJudge()
    shown = [(r["prompt"], r["response"], Bucket(r["bucket"]), r["truncated"]) for r in rows]
    labels = Counter(judge.judge(p, r, b, truncated=t).label for p, r, b, t in shown)
    assert len(labels) == 4 and max(labels.values()) < 0.5 * 600
    assert labels[Label.HARMLESS_BROKEN] < 0.15 * 600, "a broken response is judged early, and so too fast"
    assert rows == list(bench.completions(600))


def test_a_measurement_has_both_runs_and_the_growth(bench):
    found = bench.measure(30)
    assert found["n"] == 30 and found["first_s"] > 0 and found["again_s"] > 0 and found["growth_mib"] >= 0
    assert "30" in bench.as_text([found])
