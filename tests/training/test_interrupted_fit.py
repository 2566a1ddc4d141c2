"""A fit that is killed, fails or meets another run's checkpoint: what is kept, and that it ends with the same weights."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from paving.controller import ControllerConfig, fresh_controller
from paving.training import checkpoint as checkpoint_module
from paving.training import losses
from paving.training.checkpoint import TrainingError, load_checkpoint
from paving.training.stages import fit
from tiny_fits import CONFIG, EPOCHS, fitted, same
from tiny_models import ROUTED

# --- kill, resume, refuse ---------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("when", [("gate", 2, 2), ("contrastive", 1, 2), ("stage 2", 2, 1), ("stage 3", 1, 2)])
def test_a_killed_fit_goes_on_and_ends_with_the_uninterrupted_weights(base, ready, whole, tmp_path, when):
    stage = when[0]
    epochs = []

    def watch(name, step, _steps, _means):
        if name == stage and step == 1:
            epochs.append(name)
        if (name, len(epochs), step) == when:
            raise Killed

    with pytest.raises(Killed):
        fitted(base, ready, tmp_path, watch=watch)
    shown = []
    resumed, records = fitted(base, ready, tmp_path, watch=lambda name, at, *_: shown.append((name, at)), seed=7)
    assert shown[0] == (stage, 1), "finished epochs are not run again, the interrupted one from its start"
    assert [(r.stage, r.epoch) for r in records] == EPOCHS
    assert same(resumed, whole[0])


def test_a_finished_fit_called_again_runs_no_epoch(base, ready, whole):
    again, records = fitted(base, ready, whole[2], watch=lambda *_: pytest.fail("an epoch was run again"))
    assert same(again, whole[0])
    assert [(r.stage, r.epoch, r.losses) for r in records] == [(r.stage, r.epoch, r.losses) for r in whole[1]]


def other_prompts(ready):
    rows = replace(ready.rows, edit=ready.rows.edit[1:])
    return replace(ready, rows=rows)


@pytest.mark.parametrize("change", ["learning rate", "prompts", "controller"])
def test_a_checkpoint_of_another_run_is_refused_and_left_as_it_is(base, ready, whole, change):
    folder = whole[2]
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    config = CONFIG.model_copy(update={"learning_rate": 1e-3}) if change == "learning rate" else CONFIG
    rows = other_prompts(ready).rows if change == "prompts" else ready.rows
    shape = ControllerConfig(route_layers=(0,), bottleneck_ratio=4) if change == "controller" else ROUTED
    with pytest.raises(TrainingError, match=r"belongs to another configuration or other prompts.*nothing was changed"):
        fit(base, fresh_controller(base, shape, 0), ready.traces, rows, config, folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_a_damaged_checkpoint_is_named_with_what_to_do(base, ready, tmp_path):
    (tmp_path / checkpoint_module.FILE).write_bytes(b"half a file")
    with pytest.raises(TrainingError, match=r"checkpoint\.safetensors is damaged .*Remove it"):
        fitted(base, ready, tmp_path)


def test_a_full_disk_is_a_training_error_and_the_last_checkpoint_stays(base, ready, tmp_path, monkeypatch):
    fitted(base, ready, tmp_path, CONFIG.model_copy(update={"gate_epochs": 1}))
    before = (tmp_path / checkpoint_module.FILE).read_bytes()

    def full(_tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    with pytest.raises(TrainingError, match=r"cannot write a checkpoint into .*No space left"):
        checkpoint_module.save_checkpoint(tmp_path, torch.nn.Linear(1, 1), {}, {})
    assert (tmp_path / checkpoint_module.FILE).read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_nothing_is_pickled(whole):
    assert {f.name for f in whole[2].iterdir()} == {"checkpoint.safetensors", "history.json"}


def broken_at(monkeypatch, name: str, call: int) -> None:
    real, calls = getattr(losses, name), [0]

    def term(*args, **kwargs):
        calls[0] += 1
        value = real(*args, **kwargs)
        return value * float("nan") if calls[0] == call else value

    monkeypatch.setattr(losses, name, term)


@pytest.mark.parametrize(
    ("term", "call", "says", "finished"),
    [
        ("cross_entropy", 8, r"the loss is nan in stage 2, step 2 .*ce nan", 5),
        ("gate_bce", 5, r"the loss is nan in gate, step 2", 1),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_fit_with_the_last_finished_epoch_kept(
    base, ready, tmp_path, monkeypatch, term, call, says, finished
):
    controller = fresh_controller(base, ROUTED, 0)
    with monkeypatch.context() as patch:
        broken_at(patch, term, call)
        with pytest.raises(TrainingError, match=says) as caught:
            fit(base, controller, ready.traces, ready.rows, CONFIG, tmp_path)
    assert "The last finished epoch is kept in" in str(caught.value) and "\n" not in str(caught.value)
    assert not any(p.requires_grad for p in controller.weights.parameters())
    stored = fresh_controller(base, ROUTED, 9)
    run = json.loads(metadata(tmp_path)["done"])
    done = load_checkpoint(tmp_path, stored.weights, {}, run["run"])
    assert [(r["stage"], r["epoch"]) for r in done["records"]] == EPOCHS[:finished]
    assert same(stored, controller), "the controller at hand is the last finished epoch's, not a half-trained one"
    assert all(torch.isfinite(p).all() for p in stored.weights.parameters())


def test_a_fit_that_fails_at_once_keeps_its_first_weights_and_promises_no_checkpoint(base, ready, tmp_path, monkeypatch):
    broken_at(monkeypatch, "gate_bce", 1)
    controller = fresh_controller(base, ROUTED, 0)
    with pytest.raises(TrainingError) as caught:
        fit(base, controller, ready.traces, ready.rows, CONFIG, tmp_path)
    assert "kept in" not in str(caught.value)
    first = fresh_controller(base, ROUTED, 0)
    assert torch.equal(controller.weights.router.gate.weight, first.weights.router.gate.weight)


def test_a_fit_that_fails_goes_on_after_the_cause_is_gone(base, ready, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        broken_at(patch, "cross_entropy", 8)
        with pytest.raises(TrainingError):
            fitted(base, ready, tmp_path)
    resumed, _ = fitted(base, ready, tmp_path)
    assert same(resumed, whole[0])


def test_a_gradient_that_is_not_finite_in_an_epochs_last_step_is_not_saved(base, ready, tmp_path, monkeypatch):
    real, calls = losses.cross_entropy, [0]

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x.clone()

        @staticmethod
        def backward(_ctx, grad):
            return grad * float("nan")

    def term(*args):
        calls[0] += 1
        value = real(*args)
        return Poison.apply(value) if calls[0] == 2 else value  # the contrastive warm-up has two steps

    monkeypatch.setattr(losses, "cross_entropy", term)
    with pytest.raises(TrainingError, match="weights are no longer finite after contrastive"):
        fitted(base, ready, tmp_path)
    assert len(json.loads(metadata(tmp_path)["done"])["records"]) == 2


def metadata(folder) -> dict:
    with safe_open(folder / checkpoint_module.FILE, framework="pt") as file:
        return file.metadata()
