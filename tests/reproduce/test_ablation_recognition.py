"""A run says which ablation it is by its configuration alone; two changes at once are none."""

from __future__ import annotations

import pytest
from made_up_runs import changed, with_seed

from paving.ablations import ABLATIONS, at_scale
from paving.reproduce.variants import known_variant, leaves, named_variant, variant_of
from paving.run_folder import RunConfig

FULL = RunConfig()
LATE = changed(FULL, controller__route_layers=[8, 12, 16], controller__edit_layers=list(range(5, 30)))

CHANGES = [
    (FULL, {"training__contrastive_epochs": 0}, "no-contrastive"),
    (FULL, {"training__weights__trajectory": 0.0}, "no-trajectory"),
    (FULL, {"training__stage_epochs": [2, 4, 0]}, "no-stage-3"),
    (FULL, {"training__horizon": 6}, "short-horizon"),
    (FULL, {"controller__edit_layers": list(range(16, 34))}, "late-edits"),
    (LATE, {"controller__edit_layers": list(range(15, 30))}, "late-edits"),
    (FULL, {"controller__route_layers": [8, 9, 10, 11]}, "late-router"),
    (
        FULL,
        {"controller__route_layers": [8, 9, 10, 11], "controller__edit_layers": list(range(12, 34))},
        "late-router",
    ),
    (LATE, {"controller__route_layers": [7, 8, 9, 10], "controller__pooling": "last"}, "late-router"),
    (LATE, {"controller__route_layers": [1, 2, 3, 4]}, "early-router"),
    (FULL, {"controller__n_experts": 1, "controller__centres": [0.55], "controller__widths": [0.45]}, "single-expert"),
    (
        FULL,
        {
            "controller__n_experts": 1,
            "controller__centres": [0.5],
            "controller__widths": [0.45],
            "controller__activation": "none",
        },
        "low-rank",
    ),
    (FULL, {"objectives": "two"}, "two-objectives"),
]
NONE = [
    ({"training__contrastive_epochs": 2}, "training.contrastive_epochs"),
    ({"training__weights__trajectory": 0.5}, "training.weights.trajectory"),
    ({"training__stage_epochs": [2, 0, 1]}, "training.stage_epochs"),
    ({"training__stage_epochs": [1, 4, 0]}, "training.stage_epochs"),
    ({"training__horizon": 40}, "training.horizon"),
    ({"controller__route_layers": [0, 9]}, "controller.route_layers"),
    ({"controller__edit_layers": [5, 6]}, "controller.edit_layers"),
    ({"controller__n_experts": 2, "controller__centres": [0.3, 0.7], "controller__widths": [0.2, 0.2]}, "n_experts"),
    ({"training__contrastive_epochs": 0, "training__weights__trajectory": 0.0}, "training.weights.trajectory"),
    ({"training__contrastive_epochs": 0, "edit": "other.jsonl"}, "edit"),
    ({"controller__activation": "none"}, "controller.activation"),
    ({"decoding__max_new_tokens": 32}, "decoding.max_new_tokens"),
]


@pytest.mark.parametrize("full, change, name", CHANGES)
def test_an_ablation_is_known_by_what_it_leaves_out(full, change, name):
    assert variant_of(changed(full, **change), full) == known_variant(changed(full, **change), full) == name


@pytest.mark.parametrize("change, field", NONE)
def test_anything_else_is_told_by_the_fields_that_differ(change, field):
    config = changed(FULL, **change)
    assert known_variant(config, FULL) is None
    assert variant_of(config, FULL).startswith("differs in ") and field in variant_of(config, FULL)


def test_another_seed_is_the_same_recipe():
    assert variant_of(with_seed(FULL, 7), FULL) is None
    assert variant_of(with_seed(changed(FULL, training__horizon=6), 7), FULL) == "short-horizon"


def test_the_full_recipe_is_no_ablation_of_its_ablation():
    for full, change, name in CHANGES:
        if "router" not in name:  # early and late stand for places, not for the way from one to the other
            assert known_variant(full, changed(full, **change)) is None


def test_a_configuration_without_the_mixture_field_trained_under_the_router():
    before = {k: v for k, v in leaves(FULL).items() if k != "training.mixture"}
    assert leaves(FULL)["training.mixture"] == "router"
    assert named_variant({**before, "training.mixture": "expert:0"}, leaves(FULL)) == "fixed-expert"
    for other in ("expert:2", "uniform"):
        assert named_variant({**before, "training.mixture": other}, leaves(FULL)) is None


def test_a_given_scale_of_those_searched_is_no_second_change():
    given = {"calibration__scales": [4.0], "calibration__policies": ["thresholded"]}
    assert known_variant(changed(FULL, training__contrastive_epochs=0, **given), FULL) == "no-contrastive"
    assert variant_of(changed(FULL, **given), FULL).startswith("differs in calibration.policies, calibration.scales")
    for other in ({"calibration__scales": [5.0]}, {"calibration__scales": [2.0, 4.0]}):
        assert known_variant(changed(FULL, training__contrastive_epochs=0, **{**given, **other}), FULL) is None


def test_the_librarys_own_ablations_are_all_known_by_their_names():
    for full in (FULL, changed(LATE, controller__pooling="last+mean")):
        for ablation in ABLATIONS:
            if full is FULL and ablation.name == "early-router":
                continue  # the paper's recipe reads early itself
            config = at_scale(ablation.change(full, 30), 2.0)
            assert known_variant(config, full) == ablation.name
