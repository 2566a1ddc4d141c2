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
    alone, early, *steps = routing_steps.steps_of((8, 12, 16), 30).values()
    assert alone == steps[0] and early == steps[0].model_copy(update={"layers": ((1, 2, 3, 4),)})
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
        "steps": [routing_steps.pooled("one", [row], [row], {p.id: p.group for p in prompts})],
        "promise": {0: {"harmful_keep": {"of all": routing_steps.resplit(np.arange(4.0), keeps(4), 0.5, False)}}},
    }
    text = routing_steps.as_text(summary)
    assert (
        "| one | 0.750 [" in text
        and "(0.750) | +0.000 [+0.000, +0.000] | 1/1 100.0 |" in text
        and "1/4 25.0 [" in text
        and "too few groups" in text
    )


def test_what_arithmetic_says_is_what_shuffled_scores_do(routing_steps):
    """51 groups, 25 of which set the threshold: three of the highest must fall among the other 26."""
    rng, exceeded = np.random.default_rng(0), 0
    for _ in range(4000):
        scores = rng.permutation(51)
        exceeded += (scores[25:] > scores[:25].max()).mean() > routing_steps.ALPHA
    assert routing_steps.by_arithmetic(51, 25) == pytest.approx(exceeded / 4000, abs=0.02)
    found = routing_steps.resplit(rng.normal(size=51), keeps(51), 0.5, False)
    assert found["by_arithmetic"] == routing_steps.by_arithmetic(51, found["first"])


def test_the_held_out_row_counts_groups_as_promised_and_prompts_as_deployed(routing_steps):
    prompts = keeps(60, per_group=2)
    scores = np.full(60, -3.0)
    scores[[50, 51, 54, 58]] = -1.0, 2.0, -2.5, 1.0  # 50 and 51 are one group
    found = routing_steps.promised_once(scores, prompts, range(50), range(50, 60))
    assert found["threshold"] == -3.0 and found["first"] == 25
    assert found["rate"] == 3 / 5, "three of five groups have a prompt above the threshold of the calibration"
    assert found["prompt_rate"] == 2 / 10, "and two of ten prompts open a gate that never opens below 0"


def test_an_auc_and_its_interval_are_of_all_seeds(routing_steps):
    prompts = [*keeps(8), *(Prompt(f"e{i}", "edit", Bucket.EDIT, group=f"e{i}") for i in range(8))]
    rng, groups = np.random.default_rng(3), {p.id: p.group for p in prompts}
    seeds = []
    for shift in (0.5, 2.0):
        logits = rng.normal(size=16) + shift * np.array([p.bucket is Bucket.EDIT for p in prompts])
        seeds.append(routing_steps.step(prompts, logits, logits > 0, ""))
    row = routing_steps.pooled("one", seeds, seeds[::-1], groups)
    assert row["auc"] == [pytest.approx(routing_steps.won(s).mean()) for s in seeds]
    assert row["auc_interval"][0] < np.mean(row["auc"]) < row["auc_interval"][1]
    assert row["difference"] == pytest.approx(0.0)
