"""A run of two objectives learns nothing from harmful keeps, is measured on them, and cannot be put to use."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import paving.run as runs
from paving.ablations import run_ablation
from paving.controller.paved_model import PavedModel, load_paved
from paving.controller.store import ControllerError, load_controller, save_controller
from paving.prompts.types import Bucket, SplitName
from paving.router_search import search_router
from paving.run_folder import RunConfig, RunError, read_config
from paving.run_splits import recorded_split
from paving.serving import plugin
from paving.serving.command import server_command
from paving.training.gate_search import GateSearch
from tiny_runs import WordJudge, tiny_run


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(the full recipe's folder, the folder of two objectives, its metrics, what it was fitted and calibrated on)"""
    config, means = tiny_run(tmp_path_factory.mktemp("prompts"))
    folder, seen = tmp_path_factory.mktemp("runs"), {}
    fit, calibrate = runs.fit, runs.calibrate

    def watched_fit(backbone, controller, traces, rows, *rest):
        seen["rows"] = rows
        return fit(backbone, controller, traces, rows, *rest)

    def watched_calibrate(backbone, controller, splits, *rest, **options):
        seen["splits"] = splits
        return calibrate(backbone, controller, splits, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "judge_from", lambda line, **_: WordJudge())
        runs.train(config, folder / "three", means)
        runs.evaluate(folder / "three", means)
        patch.setattr(runs, "fit", watched_fit)
        patch.setattr(runs, "calibrate", watched_calibrate)
        metrics = run_ablation(folder / "three", "two-objectives", folder / "two", means)
    return folder / "three", folder / "two", metrics, seen, means


def test_nothing_is_fitted_or_calibrated_on_a_harmful_keep(two):
    full, folder, metrics, seen, _ = two
    assert seen["rows"].harmful_keep == () and seen["rows"].edit and seen["rows"].benign_keep
    fitting = (SplitName.TRAIN, SplitName.CALIBRATION)
    assert not [p for s in fitting for p in seen["splits"].of(s, Bucket.HARMFUL_KEEP)]
    stages = {name for record in metrics.training for name in record.losses}
    assert "harmful preservation" not in stages and "benign preservation" in stages
    weights = load_file(folder / "controller" / "controller.safetensors")
    assert weights["veto.fitted"] == 0, "a veto is fitted on harmful keeps"
    ours, theirs = (load_file(f / "controller" / "controller.safetensors") for f in (folder, full))
    assert not torch.equal(ours["router.mean"], theirs["router.mean"])


def test_its_rows_are_measured_on_the_same_prompts_of_every_bucket(two):
    full, folder, metrics, *_ = two
    ids = [recorded_split(read_config(f), f).ids()["held_out"] for f in (full, folder)]
    assert ids[0] == ids[1] and ids[0]["harmful_keep"]
    assert [r.name for r in metrics.rows] == ["base", "learned", "oracle"]
    assert all(r.refusal["harmful_keep"].n == len(ids[0]["harmful_keep"]) for r in metrics.rows)


def test_it_can_be_measured_and_not_used(two, tmp_path, monkeypatch):
    _, folder, _, _, means = two
    config = read_config(folder)
    with pytest.raises(ControllerError, match="without harmful keeps"):
        load_paved(controller=folder)
    backbone = means.load(config.model, config.dtype)
    controller = load_controller(folder / "controller", backbone)
    with pytest.raises(ControllerError, match="not exported or served"):
        PavedModel(backbone, controller)
    copy = save_controller(replace(controller, name="copied"), tmp_path / "copy")
    with pytest.raises(ControllerError, match="not exported or served"):  # the mark travels with the controller
        load_paved(config.model, controller=copy, dtype="float32", device="cpu")
    with pytest.raises(ControllerError, match="not exported or served"):
        server_command(folder, model=None, host="127.0.0.1", port=8000)
    monkeypatch.setattr(plugin, "check_version", lambda: None)
    with pytest.raises(ControllerError, match="not exported or served"):
        plugin.install(str(folder))
    with pytest.raises(RunError, match="without harmful keeps"):
        search_router(folder, tmp_path / "searched", GateSearch(), means)
    assert not (tmp_path / "searched").exists()


def test_its_card_says_what_it_is_and_what_it_was_fitted_on(two):
    _, folder, *_ = two
    card = (folder / "controller" / "README.md").read_text()
    assert "**For measuring only**" in card and "deploy it as it is" not in card
    counts = {line.split("|")[1].strip(): line.split("|")[4].strip() for line in card.splitlines() if line.startswith("| ")}
    held_out = recorded_split(read_config(folder), folder).of(SplitName.HELD_OUT, Bucket.HARMFUL_KEEP)
    assert (counts["train"], counts["calibration"], counts["held_out"]) == ("0", "0", str(len(held_out)))
    assert "to be measured, not to be used" in (folder / "report.html").read_text()


def test_a_run_with_a_promise_has_no_such_variant(two, tmp_path):
    full, *_, means = two
    promised = shutil.copytree(full, tmp_path / "promised")
    content = json.loads((promised / "config.json").read_text())
    content["calibration"] |= {"promise": {"harmful": 0.5}, "policies": ["hard"]}
    (promised / "config.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"two-objectives cannot be made of .*harmful keeps"):
        run_ablation(promised, "two-objectives", tmp_path / "variant", means)
    assert not (tmp_path / "variant").exists()


def test_a_promise_about_harmful_keeps_needs_them():
    with pytest.raises(ValueError, match='objectives="three"'):
        RunConfig.model_validate({"objectives": "two", "calibration": {"promise": {"harmful": 0.1}, "policies": ["hard"]}})
    assert RunConfig.model_validate({}).objectives == "three"
