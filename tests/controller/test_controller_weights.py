"""The experts' arithmetic against the formula written out, and the configuration's limits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from paving.backbone import BackboneError
from paving.controller import ControllerConfig, fresh_controller
from paving.controller.config import WINDOW_FLOOR, windows
from tiny_models import HIDDEN, LAYERS, ROUTED, lively


def test_an_untrained_controller_edits_nothing(backbone):
    experts = fresh_controller(backbone, ROUTED, seed=0).weights.experts
    resid = torch.randn(2, 3, HIDDEN)
    for edit in experts.edits(torch.ones(2, 3), torch.float32).values():
        assert torch.equal(edit(resid), resid)


@pytest.mark.parametrize("activation", ["gelu", "none"])
@pytest.mark.parametrize("n_columns", [1, 4])
def test_an_edit_is_the_sum_over_experts_of_the_formula(backbone, n_columns, activation):
    experts = lively(backbone, ROUTED.model_copy(update={"activation": activation})).weights.experts
    experts.rms.copy_(torch.linspace(0.5, 2.0, len(experts.rms)))
    experts.gain.copy_(torch.rand(experts.gain.shape) * 6 - 1)  # some below 0, some above the clip
    strength, resid = torch.rand(3, 3), torch.randn(3, n_columns, HIDDEN)
    edits = experts.edits(strength, torch.float32)
    assert set(edits) <= set(experts.layers)
    for i, layer in enumerate(experts.layers):
        expected = resid.clone()
        for k in range(3):
            gain = min(max(experts.gain[i, k].item(), 0.0), 4.0)
            window = ROUTED.window(k, layer, LAYERS)
            hidden = resid / experts.rms[i] @ experts.w_in[i, k] + experts.b_in[i, k]
            hidden = F.gelu(hidden, approximate="tanh") if activation == "gelu" else hidden
            edit = experts.rms[i] * gain * window * (hidden @ experts.w_out[i, k])
            expected += strength[:, k, None, None] * edit
        torch.testing.assert_close(edits[layer](resid), expected, atol=1e-4, rtol=1e-4)


def test_a_row_of_zero_strength_is_left_as_it_is_to_rounding(backbone):
    experts = lively(backbone).weights.experts
    strength = torch.tensor([[0.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    resid = torch.randn(2, 2, HIDDEN)
    for edit in experts.edits(strength, torch.float32).values():
        edited = edit(resid)
        torch.testing.assert_close(edited[0], resid[0])
        assert not torch.allclose(edited[1], resid[1], atol=1e-2)


depths = st.integers(2, 60)


@given(depths, st.integers(0, 2), st.data())
def test_a_window_is_a_gaussian_over_depth_with_its_tail_cut_to_zero(n_layers, expert, data):
    layer = data.draw(st.integers(0, n_layers - 1))
    value = ControllerConfig().window(expert, layer, n_layers)
    centre, width = ((0.30, 0.15), (0.55, 0.20), (0.80, 0.15))[expert]
    gaussian = math.exp(-(((layer / (n_layers - 1)) - centre) ** 2) / (2 * width**2))
    assert value == (pytest.approx(gaussian) if gaussian >= WINDOW_FLOOR else 0.0)


def test_an_expert_outside_its_window_costs_and_adds_nothing(backbone):
    config = ControllerConfig(route_layers=(0,), n_experts=2, centres=(0.2, 1.0), widths=(0.05, 0.05),
                              bottleneck_ratio=4)  # fmt: skip
    experts = lively(backbone, config).weights.experts
    edits = experts.edits(torch.ones(1, 2), torch.float32)
    assert set(edits) == {1, 5}, "no expert's window reaches the layers between"


@settings(max_examples=20)
@given(st.integers(1, 8))
def test_windows_of_any_number_of_experts_make_a_valid_configuration(k):
    centres, widths = windows(k)
    config = ControllerConfig(n_experts=k, centres=centres, widths=widths)
    assert all(0 < c < 1 for c in config.centres)
    assert windows(3) == ((0.30, 0.55, 0.80), (0.15, 0.20, 0.15))


def test_edit_layers_default_to_every_block_above_the_router(backbone):
    assert ROUTED.resolved(backbone).edit_layers == (2, 3, 4, 5)
    assert ROUTED.resolved(backbone).reads_before_it_edits


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_experts": 2}, "2 experts need as many window centres and widths; got 3"),
        ({"widths": (0.1, 0.0, 0.1)}, "widths must be positive"),
        ({"route_layers": ()}, "at least one layer, each once"),
        ({"route_layers": (1, 1)}, "at least one layer, each once"),
        ({"edit_layers": (4, 3)}, "increasing and not empty"),
        ({"edit_layers": ()}, "increasing and not empty"),
        ({"pooling": "max"}, r"'last', 'mean' or 'last\+mean'"),
        ({"surprise": 1}, "Extra inputs are not permitted"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        ControllerConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"route_layers": (1, 6)}, r"route layer 6 does not exist: tiny-llama has layers 0\.\.5"),
        ({"edit_layers": (2, 9)}, "edit layer 9 does not exist"),
        ({"route_layers": (5,)}, "no layer is left to edit after route layer 5"),
        ({"bottleneck_ratio": 64, "route_layers": (0,)}, "bottleneck_ratio 64 exceeds the width 32"),
    ],
)
def test_a_configuration_that_does_not_fit_the_backbone_is_refused(backbone, changes, says):
    with pytest.raises(BackboneError, match=says):
        ControllerConfig(**changes).resolved(backbone)


def test_a_fresh_controller_is_fixed_by_its_seed_and_leaves_the_global_generator_alone(backbone):
    state = torch.random.get_rng_state()
    one, two, other = (fresh_controller(backbone, ROUTED, seed).weights.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["experts.w_in"], other["experts.w_in"])
