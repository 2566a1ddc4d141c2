"""Which channels a circuit holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paving.circuit.mask import CircuitError, Mask, choose

score_tables = st.integers(1, 4).flatmap(
    lambda layers: st.integers(2, 12).flatmap(
        lambda n: st.lists(st.lists(st.floats(0, 10, width=32), min_size=n, max_size=n), min_size=layers, max_size=layers)
    )
)


def as_scores(rows: list[list[float]]) -> dict[int, torch.Tensor]:
    return {layer + 1: torch.tensor(row, dtype=torch.float64) for layer, row in enumerate(rows)}


@given(score_tables, st.floats(0.01, 1))
def test_the_top_holds_no_channel_below_one_it_leaves_out(rows, fraction):
    scores = as_scores(rows)
    n = len(rows[0])
    if round(fraction * n) == 0:
        with pytest.raises(CircuitError, match="give one in"):
            choose(scores, "neurons", fraction)
        return
    mask = choose(scores, "neurons", fraction)
    for layer, s in scores.items():
        chosen = set(mask.channels[layer])
        assert len(chosen) == round(fraction * n)
        left = [s[i].item() for i in range(n) if i not in chosen]
        assert not left or min(s[i].item() for i in chosen) >= max(left)


@given(score_tables)
def test_a_global_choice_has_the_size_of_the_whole_and_may_leave_layers_out(rows):
    scores = as_scores(rows)
    total = len(rows) * len(rows[0])
    mask = choose(scores, "outputs", 0.5, scope="global")
    assert mask.size == round(0.5 * total)
    everything = torch.cat([scores[layer] for layer in sorted(scores)])
    threshold = everything.sort(descending=True).values[mask.size - 1]
    assert all(scores[layer][i] >= threshold for layer, chosen in mask.channels.items() for i in chosen)


def test_bottom_and_random_are_of_the_same_size_and_bottom_is_the_other_end():
    scores = {layer: torch.arange(20.0) for layer in (1, 2)}
    top, bottom = choose(scores, "neurons", 0.15), choose(scores, "neurons", 0.15, choice="bottom")
    assert top.channels == {1: (17, 18, 19), 2: (17, 18, 19)}
    assert bottom.channels == {1: (0, 1, 2), 2: (0, 1, 2)}
    drawn = choose(scores, "neurons", 0.15, choice="random", seed=3)
    assert drawn.size == top.size and drawn == choose(scores, "neurons", 0.15, choice="random", seed=3)
    assert drawn != choose(scores, "neurons", 0.15, choice="random", seed=4)


def test_ties_go_to_the_lower_index():
    assert choose({1: torch.zeros(8)}, "neurons", 0.25).channels == {1: (0, 1)}


@pytest.mark.parametrize("channels", [(3, 1), (1, 1), (), (-1, 2), (2, 48)])
def test_channels_that_cannot_be_are_refused(channels):
    with pytest.raises(CircuitError):
        Mask("neurons", 48, {1: channels})
