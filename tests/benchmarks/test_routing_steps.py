"""The routing benchmark's own arithmetic: what a promise is worth on prompts that did not set its threshold."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from paving.prompts.types import Bucket, Prompt


@pytest.fixture
def routing_steps(script):
    return script("routing_steps")


def keeps(n: int, per_group: int = 1) -> list[Prompt]:
    return [Prompt(f"k{i}", f"text {i}", Bucket.HARMFUL_KEEP, group=f"g{i // per_group}") for i in range(n)]


@pytest.mark.parametrize("of", ["of all", "of the next"])
def test_a_promise_on_alike_prompts_is_kept(routing_steps, of):
    found = routing_steps.resplit(
        np.random.default_rng(1).normal(size=200), keeps(200), routing_steps.PROMISED[of], of != "of all"
    )
    assert found["groups"] == 200 and found["resplits"] == routing_steps.RESPLITS
    assert found["exceeded"] <= routing_steps.DELTA and 0 < found["mean_rate"] < routing_steps.ALPHA


def test_promised_of_the_next_ones_it_is_kept_where_halves_are_too_small_to_show_it(routing_steps):
    """51 groups: of 25 none may open; among the other 26 more than a tenth do in 11.7 % of draws, of the next 15 in less."""
    exceeded = []
    for seed in range(40):
        scores = np.random.default_rng(seed).normal(size=51)
        exceeded.append(
            [
                routing_steps.resplit(scores, keeps(51), share, of != "of all")["exceeded"]
                for of, share in routing_steps.PROMISED.items()
            ]
        )
    of_all, of_the_next = np.mean(exceeded, axis=0)
    assert of_the_next < 0.1 < of_all


def test_too_few_groups_promise_nothing(routing_steps):
    assert routing_steps.resplit(np.arange(60.0), keeps(60, per_group=4), 0.5, False)["exceeded"] is None


def test_each_step_allows_what_the_one_before_does_and_more(routing_steps):
    steps = list(routing_steps.steps_of((8, 12, 16), 30).values())
    for before, after in pairwise(steps):
        assert before != after
        assert set(before.layers) <= set(after.layers) and set(before.poolings) <= set(after.poolings)
        assert set(before.kernels) <= set(after.kernels)
    assert [s.contrast for s in steps] == ["none", "none", "none", "starter"]


def test_rows_are_printed_with_n_and_interval(routing_steps):
    prompts = [*keeps(4), Prompt("e", "edit", Bucket.EDIT, group="e"), Prompt("b", "benign", Bucket.BENIGN_KEEP, group="b")]
    logits = np.array([1.0, -1.0, -2.0, -3.0, 0.5, -1.0])
    row = routing_steps.step(prompts, logits, logits > 0, "why")
    assert row["auc"] == 0.75
    summary = {
        "steps": [routing_steps.pooled("one", [row], {p.id: p.group for p in prompts})],
        "promise": {0: {"harmful_keep": {"of all": routing_steps.resplit(np.arange(4.0), keeps(4), 0.5, False)}}},
    }
    text = routing_steps.as_text(summary)
    assert "| one | 0.750 (0.750) | 1/1 100.0 |" in text and "1/4 25.0 [" in text and "too few groups" in text
