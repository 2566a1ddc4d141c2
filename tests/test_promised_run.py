"""A run whose gate makes a promise: the threshold keeps it, the reader is told, and what cannot be promised is refused."""

from __future__ import annotations

import json

import pytest

from paving.cli import run_config
from paving.prompts.types import Bucket
from paving.run import evaluate, train
from paving.training.config import CalibrationConfig
from paving.training.promise import PromiseConfig, PromiseError
from tiny_runs import WordJudge, tiny_run


def promised(tmp_path, policies=("thresholded",), **levels):
    config, means = tiny_run(tmp_path)
    calibration = CalibrationConfig(scales=(1.0,), policies=policies, promise=PromiseConfig(**levels))
    return config.model_copy(update={"calibration": calibration}), means


def test_the_threshold_keeps_the_promise_and_the_reader_is_told(tmp_path):
    config, means = promised(tmp_path, harmful=0.4, benign=0.5, delta=0.4)
    folder = tmp_path / "run"
    controller = train(config, folder, means, WordJudge())
    kept = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    assert [p["bucket"] for p in kept["promises"]] == [Bucket.HARMFUL_KEEP, Bucket.BENIGN_KEEP]
    assert kept["threshold"] == controller.policy.threshold >= max(p["threshold"] for p in kept["promises"])
    assert all(p["opened"] <= p["allowed"] for p in kept["promises"])
    assert {p["threshold"] for p in kept["promises"]} == {kept["threshold"]}
    metrics = evaluate(folder, means, judge=WordJudge())
    assert metrics.promises == [p["sentence"] for p in kept["promises"]]
    for shown in (folder / "report.html", folder / "controller" / "README.md"):
        assert metrics.promises[0] in shown.read_text(encoding="utf-8")


def test_too_few_prompts_are_said_before_training(tmp_path, monkeypatch):
    config, means = promised(tmp_path, harmful=0.01, delta=0.05)
    monkeypatch.setattr("paving.run.fit", lambda *_a, **_k: pytest.fail("trained"))
    with pytest.raises(PromiseError, match=r"No promise that at most 1%.* are too few, \d+ more groups are needed"):
        train(config, tmp_path / "run", means, WordJudge())


def test_a_gate_that_never_closes_promises_nothing():
    with pytest.raises(ValueError, match="names a level for harmful keeps"):
        PromiseConfig(harmful=None)
    with pytest.raises(ValueError, match="leave soft out of the policies"):
        CalibrationConfig(promise=PromiseConfig())


OPTIONS = (
    "model", "edit", "benign", "harmful", "system", "targets", "targets_from", "route_layers", "edit_layers", "pooling",
    "experts", "seed", "judge", "promise", "horizon", "allow_leakage", "dtype",
)  # fmt: skip


def test_an_option_that_is_given_goes_before_the_file_also_where_it_is_the_default(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps(
            {
                "model": "other",
                "edit": "mine.jsonl",
                "dtype": "float32",
                "allow_leakage": True,
                "controller": {"n_experts": 2, "centres": [0.3, 0.7], "widths": [0.2, 0.2], "pooling": "mean"},
                "training": {"targets": "own"},
            }
        ),
        encoding="utf-8",
    )
    asked = dict.fromkeys(OPTIONS)
    kept = run_config(file, **asked)
    assert (kept.edit, kept.dtype, kept.allow_leakage, kept.training.targets) == ("mine.jsonl", "float32", True, "own")
    assert (kept.controller.n_experts, kept.controller.pooling) == (2, "mean")
    given = {
        "edit": "starter", "dtype": "auto", "allow_leakage": False, "targets": "reframe", "experts": 3, "pooling": "last",
        "horizon": 40,
    }  # fmt: skip
    found = run_config(file, **asked | given)
    assert (found.edit, found.dtype, found.allow_leakage, found.training.targets) == ("starter", "auto", False, "reframe")
    assert (found.controller.n_experts, found.controller.pooling) == (3, "last")
    assert (kept.training.horizon, found.training.horizon) == (12, 40)


def test_the_command_leaves_the_soft_gate_out(tmp_path):
    options = dict.fromkeys(OPTIONS)
    assert run_config(None, **options).calibration.promise is None
    found = run_config(None, **options | {"promise": "0.03"}).calibration
    more = run_config(None, **options | {"promise": "benign=0.03,delta=0.2"}).calibration.promise
    assert more == PromiseConfig(harmful=None, benign=0.03, delta=0.2)
    assert found.promise == PromiseConfig(harmful=0.03) and found.policies == ("thresholded", "hard")
