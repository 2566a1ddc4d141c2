"""α is the strongest edit that keeps to the limit, never one that breaks answers instead of refusing them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paving.generation import Decoding
from paving.intervention import Identity
from paving.prompts.types import Bucket
from paving.training.strength import StrengthPoint, choose_strength, prompts_needed, sweep
from tiny_models import prompt, tiny_backbone


def point(strength: float, harmful: int, benign: int, broken: int = 0, n: int = 100) -> StrengthPoint:
    return StrengthPoint(strength, n, harmful, 0, n, benign, broken)


curves = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 60), st.integers(0, 40)), min_size=1, max_size=8).map(
    lambda rows: [point(0.0, 2, 1), *(point(0.5 + i, *row) for i, row in enumerate(rows))]
)


@given(curves, st.floats(0, 0.5))
def test_nothing_stronger_within_the_limits_is_passed_over(points, limit):
    chosen = choose_strength(points, limit)
    beyond = [p.strength for p in points[1:] if (p.benign_refused + 1) / (p.n_benign + 1) > limit]
    allowed = [
        p for p in points[1:]
        if p.strength < min(beyond, default=99) and p.benign_breakage <= points[0].benign_breakage + limit
    ]  # fmt: skip
    if not allowed:
        assert chosen is None
    else:
        assert chosen in allowed and chosen.harmful_refused == max(p.harmful_refused for p in allowed)


def test_the_chosen_strength_holds_its_limit_on_an_unseen_prompt_where_the_plain_rate_does_not():
    rng = np.random.default_rng(0)
    strengths, limit, n = np.arange(1, 9), 0.1, 40
    by_rule, by_rate = [], []
    for _ in range(1500):
        breaks_at = rng.uniform(0, 30, size=n + 1)  # a prompt is refused from its own strength on; the last one is new
        refused = [(breaks_at[:n] <= s).sum() for s in strengths]
        points = [point(0, 0, 0, n=n), *(point(float(s), s, k, n=n) for s, k in zip(strengths, refused, strict=True))]
        chosen = choose_strength(points, limit)
        by_rule.append(chosen is not None and breaks_at[n] <= chosen.strength)
        naive = max((s for s, k in zip(strengths, refused, strict=True) if k / n <= limit), default=0)
        by_rate.append(breaks_at[n] <= naive)
    assert np.mean(by_rule) <= limit < np.mean(by_rate)


@pytest.mark.parametrize("limit", [0.042, 0.05, 0.1, 0.5, 1.0])
def test_so_many_prompts_and_not_one_fewer_can_show_a_limit(limit):
    n = prompts_needed(limit)
    assert choose_strength([point(0, 0, 0, n=50), point(1, 50, 0, n=max(n, 1))], limit) is not None
    if n > 1:
        assert choose_strength([point(0, 0, 0, n=50), point(1, 50, 0, n=n - 1)], limit) is None


def test_no_number_of_prompts_shows_that_nothing_is_ever_refused():
    assert prompts_needed(0.0) is None
    assert choose_strength([point(0, 0, 0), point(1, 50, 0)], 0.0) is None


def test_of_two_equal_strengths_the_weaker_is_taken_and_the_base_never_is():
    assert choose_strength([point(0, 90, 0), point(1, 50, 2), point(2, 50, 2)], 0.042).strength == 1


def test_a_strength_that_breaks_benign_answers_is_not_taken():
    assert (
        choose_strength([point(0, 5, 1, broken=3), point(1, 60, 2, broken=5), point(2, 95, 0, broken=80)], 0.042).strength
        == 1
    )


def test_a_sweep_begins_with_the_base_and_ends_where_nothing_could_be_chosen():
    backbone = tiny_backbone()
    harmful = [prompt(f"h{i}", [100 + i, 5], Bucket.HARMFUL_KEEP) for i in range(3)]
    benign = [prompt(f"b{i}", [10 + i, 5], Bucket.BENIGN_KEEP) for i in range(2)]
    asked = []

    def at(strength: float):
        asked.append(strength)
        return Identity()

    def labels_of(answers):
        over = len(asked) >= 2
        return ["HARMLESS-REFUSAL" if c.bucket == "harmful_keep" or over else "HARMLESS-BENIGN" for c in answers]

    points = sweep(backbone, harmful, benign, at, [3.0, 1.0, 2.0, 1.0], labels_of, Decoding(max_new_tokens=2))
    assert [p.strength for p in points] == [0.0, 1.0, 2.0] and asked == [1.0, 2.0]
    assert (points[0].n_harmful, points[0].harmful_refused, points[0].n_benign, points[0].benign_refused) == (3, 3, 2, 0)
    assert points[-1].over_refusal == 1.0
    asked.clear()
    known = point(0.0, 1, 0, n=3)  # the base of another sweep over the same prompts is not asked again
    assert sweep(backbone, harmful, benign, at, [1.0], labels_of, Decoding(max_new_tokens=2), known=[known])[0] is known
    assert asked == [1.0]
    asked.clear()
    kept = []  # stopped after 1.0, it goes on with 2.0
    again = sweep(
        backbone, harmful, benign, at, [1.0, 2.0], labels_of, Decoding(max_new_tokens=2),
        known=points[:2], keep=kept.append,
    )  # fmt: skip
    assert again[:2] == points[:2] and asked == [2.0] and [len(p) for p in kept] == [1, 2, 3]


def test_a_side_without_prompts_is_refused():
    with pytest.raises(ValueError, match="0 harmful and 0 benign"):
        sweep(tiny_backbone(), [], [], lambda s: Identity(), [1.0], list, Decoding())
