"""Save and load: the same decisions and outputs, tied to one base, refused when damaged, never pickled."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from paving.backbone import BackboneError
from paving.controller import (
    AlwaysOpen,
    Closed,
    ControllerError,
    Hard,
    Oracle,
    SingleExpert,
    Soft,
    ThresholdedSoft,
    Uniform,
    load_controller,
    save_controller,
)
from tiny_models import LATE, ROUTED, batch_of, decode, lively, some_prompts, tiny_backbone


@pytest.fixture
def saved(backbone, tmp_path):
    return save_controller(lively(backbone, policy=ThresholdedSoft(-0.3), use_veto=True, scale=2.0), tmp_path / "c")


@pytest.mark.parametrize("config", [ROUTED, LATE], ids=["early route", "late route"])
def test_a_loaded_controller_decides_and_edits_as_the_saved_one(any_backbone, tmp_path, config):
    controller = lively(any_backbone, config, policy=ThresholdedSoft(-0.3), use_veto=True, scale=2.0)
    loaded = load_controller(save_controller(controller, tmp_path), any_backbone)
    batch = batch_of(any_backbone, some_prompts()[:4])
    results = []
    for c in (controller, loaded):
        with c.apply(any_backbone, batch) as applied:
            results.append((decode(any_backbone.model, batch), applied.rows()))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert (loaded.policy, loaded.scale, loaded.use_veto) == (ThresholdedSoft(-0.3), 2.0, True)
    assert loaded.name == "learned+veto"
    assert not any(p.requires_grad for p in loaded.weights.parameters())


@pytest.mark.parametrize("policy", [Soft(), Hard(0.7), ThresholdedSoft(-1.5), Closed()], ids=lambda p: p.name)
@pytest.mark.parametrize("mixture", [Uniform(), SingleExpert(1)], ids=["uniform", "one expert"])
def test_policy_threshold_and_mixture_come_back(backbone, tmp_path, policy, mixture):
    controller = lively(backbone, policy=policy).with_mixture(mixture)
    loaded = load_controller(save_controller(controller, tmp_path), backbone)
    assert (loaded.policy, loaded.mixture) == (policy, mixture)


def test_nothing_is_pickled(saved):
    assert {f.name for f in saved.iterdir()} == {"controller.safetensors", "controller.json"}
    assert json.loads((saved / "controller.json").read_text())["format"] == 1
    assert load_file(saved / "controller.safetensors")


@pytest.mark.parametrize("policy", [Oracle(), AlwaysOpen()], ids=lambda p: p.name)
def test_a_diagnostic_gate_is_not_saved(backbone, tmp_path, policy):
    with pytest.raises(ControllerError, match=f"not saved with the {policy.name} gate.*soft, hard, thresholded"):
        save_controller(lively(backbone, policy=policy), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_another_base_is_refused_by_name_and_fingerprint(saved):
    other = tiny_backbone("llama", seed=8)
    says = rf"trained for tiny-llama \(fingerprint [\w-]+\), but the model at hand is tiny-llama .*{other.fingerprint}"
    with pytest.raises(BackboneError, match=says):
        load_controller(saved, other)


def damage(folder, how: str) -> None:
    weights, config = folder / "controller.safetensors", folder / "controller.json"
    description = json.loads(config.read_text())
    match how:
        case "weights missing":
            weights.unlink()
        case "weights cut short":
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        case "weights empty":
            weights.write_bytes(b"")
        case "weights not safetensors":
            weights.write_bytes(b"\x80\x04 a pickle, say" * 40)
        case "a tensor missing":
            tensors = load_file(weights)
            save_file({k: v for k, v in tensors.items() if k != "router.gate.bias"}, weights)
        case "a tensor too many":
            save_file({**load_file(weights), "surprise": torch.ones(1)}, weights)
        case "a tensor of another shape":
            save_file({**load_file(weights), "experts.gain": torch.ones(1, 1)}, weights)
        case "json missing":
            config.unlink()
        case "json cut short":
            config.write_text(config.read_text()[:100])
        case "json not text":
            config.write_bytes(b"\xff\xfe\x00\x01")
        case "json a list":
            config.write_text("[]")
        case "another format":
            config.write_text(json.dumps({**description, "format": 2}))
        case "fields missing":
            config.write_text(json.dumps({"format": 1}))
        case "base incomplete":
            config.write_text(json.dumps({**description, "base": {"name": "x"}}))
        case "unknown policy":
            config.write_text(json.dumps({**description, "policy": "often"}))
        case "unknown mixture":
            config.write_text(json.dumps({**description, "mixture": "best"}))
        case "impossible configuration":
            config.write_text(json.dumps({**description, "config": {**description["config"], "n_experts": 7}}))


DAMAGE = {
    "weights missing": "does not hold the controller",
    "weights cut short": "does not hold the controller",
    "weights empty": "does not hold the controller",
    "weights not safetensors": "does not hold the controller",
    "a tensor missing": "lacks .*router.gate.bias",
    "a tensor too many": "unknown .*surprise",
    "a tensor of another shape": "does not hold the controller",
    "json missing": "controller.json is missing",
    "json cut short": "cannot be read",
    "json not text": "cannot be read",
    "json a list": "has format None; this version reads format 1",
    "another format": "has format 2; this version reads format 1",
    "fields missing": "lacks base, config, policy",
    "base incomplete": "lacks base.fingerprint",
    "unknown policy": "'often' is not known; allowed",
    "unknown mixture": "'best' is not known; allowed",
    "impossible configuration": "does not hold the controller",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_controller_is_refused_and_the_error_says_where(backbone, saved, how):
    damage(saved, how)
    with pytest.raises(ControllerError, match=DAMAGE[how]) as caught:
        load_controller(saved, backbone)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_controller_is_refused(backbone, tmp_path):
    with pytest.raises(ControllerError, match="holds no controller"):
        load_controller(tmp_path, backbone)


def test_saving_again_replaces_the_old_controller_as_a_whole(backbone, saved):
    save_controller(lively(backbone, seed=4, policy=Soft()), saved)
    loaded = load_controller(saved, backbone)
    assert loaded.policy == Soft()
    assert torch.equal(loaded.weights.experts.w_out, lively(backbone, seed=4).weights.experts.w_out)
    assert {f.name for f in saved.iterdir()} == {"controller.safetensors", "controller.json"}
