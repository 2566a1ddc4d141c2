"""Mean states of token rows, and the direction that tells two sets of states apart."""

from __future__ import annotations

import pytest
import torch
from sklearn.decomposition import PCA
from tiny_steering import OPENINGS, PAIRS

from paving.backbone.hooks import record_residuals
from paving.steering import BehaviourConfig, SteeringError, fit_behaviour
from paving.steering.states import direction, tail_means
from paving.training.openings import Openings
from tiny_models import LAYERS

ROWS = ([5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [15, 16, 17, 18, 19, 20, 21])
BENIGN = [benign for _, benign in PAIRS]


def test_the_mean_of_a_tail_is_that_of_the_row_alone_whatever_its_company(any_backbone):
    tails = [2, 1, 3, 4]
    found = tail_means(any_backbone, ROWS, tails, (1, 4), batch_size=3)
    for row, tail, means in zip(ROWS, tails, found, strict=True):
        with torch.no_grad(), record_residuals(any_backbone, (1, 4)) as seen:
            any_backbone.model(input_ids=torch.tensor([row]), use_cache=False)
        alone = torch.stack([seen[layer][0, -tail:].mean(0) for layer in (1, 4)])
        torch.testing.assert_close(means, alone, atol=1e-4, rtol=1e-4)


def test_the_tick_counts_every_row(backbone):
    seen = []
    tail_means(backbone, ROWS, [1] * 4, (1,), batch_size=3, tick=seen.append)
    assert seen == [3, 1]


def planted(axis: int, *, flipped: bool = False, n: int = 40):
    """Pairs that differ along one axis, with a topic of their own each, and a little noise."""
    generator = torch.Generator().manual_seed(3)
    topic = 2 * torch.randn((n, 16), generator=generator)
    step = torch.zeros(16)
    step[axis] = -1.0 if flipped else 1.0
    noise = 0.1 * torch.randn((2, n, 16), generator=generator)
    return topic + step + noise[0], topic - step + noise[1]


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("extraction", ["pca_pairwise", "mean"])
def test_a_planted_direction_is_found_from_negative_to_positive(extraction, flipped):
    found = direction(*planted(5, flipped=flipped), extraction)
    expected = torch.zeros(16)
    expected[5] = -1.0 if flipped else 1.0
    torch.testing.assert_close(found / found.norm(), expected, atol=0.1, rtol=0)
    assert float(found.norm()) == pytest.approx(2.0 if extraction == "mean" else 1.0, abs=0.1)


@pytest.mark.parametrize("extraction", ["pca_pairwise", "pca_center"])
def test_the_direction_is_the_first_component_of_scikit_learn(extraction):
    positive, negative = planted(2)
    states = torch.cat([positive, negative])
    middle = torch.cat([(positive + negative) / 2] * 2) if extraction == "pca_pairwise" else states.mean(0)
    component = torch.from_numpy(PCA(1, svd_solver="full").fit((states - middle).numpy()).components_[0])
    found = direction(positive, negative, extraction)
    assert abs(float(found @ component)) == pytest.approx(1.0, abs=1e-4)
    assert float(((positive - negative) @ found > 0).float().mean()) > 0.5


def test_two_sets_that_are_the_same_have_no_direction():
    states, _ = planted(1)
    with pytest.raises(SteeringError, match="nothing tells them apart"):
        direction(states, states.clone(), "pca_pairwise")


# --- a behaviour ----------------------------------------------------------------------------------------------------


def test_a_behaviour_is_the_direction_of_states_over_the_openings(backbone):
    one = Openings(OPENINGS.refusal[:1], OPENINGS.compliance[:1])
    found = fit_behaviour(backbone, BENIGN, one, BehaviourConfig(layers=(3,), extraction="mean"))
    states = []
    for phrase in (one.refusal[0], one.compliance[0]):
        tokens = backbone.tokenizer(phrase, add_special_tokens=False)["input_ids"]
        rows = [[1, 4, *backbone.tokenizer(b)["input_ids"], 2, 5, *tokens] for b in BENIGN]  # as the chat template has it
        states.append(tail_means(backbone, rows, [len(tokens)] * len(rows), (3,), batch_size=4)[:, 0])
    mean = (states[0] - states[1]).mean(0)
    torch.testing.assert_close(found.vectors[3], mean, atol=1e-5, rtol=1e-4)
    assert found.gaps[3] == pytest.approx(float(mean.norm()), rel=1e-4)


def test_by_default_it_stands_in_the_middle_third_with_length_1_and_points_to_refusal(backbone):
    found = fit_behaviour(backbone, BENIGN, OPENINGS)
    assert sorted(found.vectors) == [LAYERS // 3, 2 * LAYERS // 3 - 1]
    assert all(float(v.norm()) == pytest.approx(1.0, abs=1e-5) for v in found.vectors.values())
    assert all(gap > 0 for gap in found.gaps.values())
    swapped = fit_behaviour(backbone, BENIGN, Openings(OPENINGS.compliance, OPENINGS.refusal))
    for layer, vector in found.vectors.items():
        assert float(vector @ swapped.vectors[layer]) < -0.9


def test_it_is_fixed_by_its_seed_and_drawn_again_by_another(backbone):
    one, same, other = (fit_behaviour(backbone, BENIGN, OPENINGS, BehaviourConfig(seed=s)) for s in (0, 0, 1))
    assert all(torch.equal(v, same.vectors[layer]) for layer, v in one.vectors.items())
    assert not all(torch.equal(v, other.vectors[layer]) for layer, v in one.vectors.items())


def test_every_prompt_is_drawn_for_as_often_as_asked(backbone):
    seen = []
    fit_behaviour(backbone, BENIGN, OPENINGS, BehaviourConfig(draws=3), tick=seen.append)
    assert sum(seen) == 2 * 3 * len(BENIGN)


def test_a_layer_that_does_not_exist_is_refused(backbone):
    with pytest.raises(ValueError, match=r"behaviour layer 6 does not exist.*0\.\.5"):
        fit_behaviour(backbone, BENIGN, OPENINGS, BehaviourConfig(layers=(6,)))
