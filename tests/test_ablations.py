"""Tables 2 and 19 as configurations: each differs from the full recipe in its own block, and can be built and trained."""

from __future__ import annotations

import pytest

from paving.ablations import ABLATIONS, ablation, at_scale
from paving.controller import ControllerConfig, fresh_controller
from paving.run_folder import RunConfig
from paving.training.config import TrainingConfig
from tiny_models import ROUTED, tiny_backbone

GEMMA = RunConfig(controller=ControllerConfig(route_layers=(1, 2, 3, 4), edit_layers=tuple(range(5, 34))))


def changed(config: RunConfig, name: str, n_layers: int) -> dict[str, object]:
    """What an ablation changes: dotted field -> its new value."""
    after = ablation(name).change(config, n_layers)
    found = {}
    for part in ("controller", "training", "calibration"):
        one, two = getattr(config, part).model_dump(), getattr(after, part).model_dump()
        found |= {f"{part}.{k}": two[k] for k in one if one[k] != two[k]}
    assert config.model_copy(update={p: getattr(after, p) for p in ("controller", "training")}) == after
    return found


def test_on_the_papers_backbone_the_ablations_are_the_papers():
    assert changed(GEMMA, "no-contrastive", 34) == {"training.contrastive_epochs": 0}
    assert changed(GEMMA, "no-trajectory", 34)["training.weights"]["trajectory"] == 0
    assert changed(GEMMA, "no-stage-3", 34) == {"training.stage_epochs": (2, 4, 0)}
    assert changed(GEMMA, "short-horizon", 34) == {"training.horizon": 6}
    assert changed(GEMMA, "late-edits", 34) == {"controller.edit_layers": tuple(range(16, 34))}
    late = {"controller.route_layers": (8, 9, 10, 11), "controller.edit_layers": tuple(range(12, 34))}
    assert changed(GEMMA, "late-router", 34) == late
    assert changed(GEMMA, "fixed-expert", 34) == {"training.mixture": "expert:0"}
    assert changed(GEMMA, "single-expert", 34)["controller.n_experts"] == 1
    low_rank = changed(GEMMA, "low-rank", 34)
    assert low_rank["controller.activation"] == "none" and low_rank["controller.n_experts"] == 1
    assert changed(GEMMA, "early-router", 34) == {}, "the paper's recipe reads early already"


@pytest.mark.parametrize("n_layers", [12, 30, 62])
@pytest.mark.parametrize("name", [a.name for a in ABLATIONS])
def test_on_any_depth_they_are_valid_configurations(name, n_layers):
    after = ablation(name).change(RunConfig(), n_layers)
    assert RunConfig.model_validate(after.model_dump(mode="json")) == after
    layers = (*after.controller.route_layers, *(after.controller.edit_layers or ()))
    assert max(layers) < n_layers


def test_all_rows_share_the_scale_and_the_gate():
    fixed = at_scale(RunConfig(), 2.0)
    assert fixed.calibration.scales == (2.0,) and fixed.calibration.policies == ("thresholded",)


def test_an_ablation_that_is_not_known_names_those_that_are():
    with pytest.raises(ValueError, match=r"allowed: no-contrastive, .*fixed-expert, low-rank"):
        ablation("no-router")


def test_a_mixture_of_an_expert_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="allowed: router, uniform"):
        TrainingConfig(mixture="experts")
    with pytest.raises(ValueError, match=r"experts 0\.\.2"):
        fresh_controller(tiny_backbone("llama"), ROUTED, 0, "expert:3")
