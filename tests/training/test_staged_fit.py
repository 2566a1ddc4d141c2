"""The staged fit on a tiny model: it learns, is fixed by its seed, survives a kill, and never touches the base."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from paving.backbone import render_batch
from paving.controller import ControllerConfig, Soft, fresh_controller
from paving.prompts.types import Bucket, SplitName, Splits
from paving.traces.forward import teacher_forced_logits
from paving.traces.store import TraceStore
from paving.training import checkpoint as checkpoint_module
from paving.training import losses
from paving.training.checkpoint import TrainingError, load_checkpoint
from paving.training.config import LossWeights, TrainingConfig
from paving.training.data import boundary_of, epoch_steps, step_batch
from paving.training.prepare import prepare
from paving.training.stages import fit, schedule, set_residual_sizes, standardise, step_losses
from tiny_models import ARCHITECTURES, LATE, ROUTED, lively, prompt, tiny_backbone

CONFIG = TrainingConfig(
    gate_epochs=2, stage_epochs=(1, 2, 1), short_horizon=3, horizon=6, learning_rate=1e-2, gate_learning_rate=1e-2,
    contrastive_learning_rate=1e-2, gate_batch=4, rows_per_step=(3, 1, 1), top_k=16, targets="own", hard_negatives=2,
)  # fmt: skip
EPOCHS = [("gate", 1), ("gate", 2), ("contrastive", 1), ("stage 1", 1), ("stage 2", 1), ("stage 2", 2), ("stage 3", 1)]


def splits(n_edit=6, n_benign=3, n_harmful=3) -> Splits:
    """Edit prompts begin with w1, benign keeps with w60, harmful keeps with w120; all unequally long."""
    rows = []
    for bucket, first, n in ((Bucket.EDIT, 1, n_edit), (Bucket.BENIGN_KEEP, 60, n_benign),
                             (Bucket.HARMFUL_KEEP, 120, n_harmful)):  # fmt: skip
        for i in range(n):
            words = [first, *range(first + 5 + i, first + 8 + 2 * i)]
            target = f"w150 w{151 + i % 3} w155 w156 w157 w158" if bucket == Bucket.EDIT else None
            rows.append(prompt(f"{bucket.value}-{i}", words, bucket, target))
    return Splits(train=tuple(rows), calibration=(), held_out=())


def prepared(backbone, folder, config=CONFIG, **sizes):
    return prepare(backbone, TraceStore(folder), splits(**sizes), config, lambda *_: True)


@pytest.fixture(scope="module")
def base():
    return tiny_backbone("llama")


@pytest.fixture(scope="module")
def ready(base, tmp_path_factory):
    return prepared(base, tmp_path_factory.mktemp("traces"))


def fitted(base, ready, folder, config=CONFIG, watch=lambda *_: None, seed=0):
    controller = fresh_controller(base, ROUTED, seed)
    records = fit(base, controller, ready.traces, ready.rows, config, folder, watch)
    return controller, records


@pytest.fixture(scope="module")
def whole(base, ready, tmp_path_factory):
    """One uninterrupted fit: (controller, records, folder)."""
    folder = tmp_path_factory.mktemp("whole")
    return *fitted(base, ready, folder), folder


def same(a, b) -> bool:
    one, two = a.weights.state_dict(), b.weights.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# --- what the fit does ------------------------------------------------------------------------------------------


def test_the_stages_run_in_the_papers_order_and_every_epoch_is_recorded(whole):
    _, records, folder = whole
    assert [(r.stage, r.epoch) for r in records] == EPOCHS
    assert [s.name for s in schedule(CONFIG)] == ["gate", "contrastive", "stage 1", "stage 2", "stage 3"]
    history = json.loads((folder / "history.json").read_text())
    assert [(r["stage"], r["epoch"]) for r in history] == EPOCHS
    assert all(math.isfinite(v) for r in records for v in r.losses.values())


def test_the_fit_teaches_the_edit_targets_and_the_gate(base, ready, tmp_path):
    config = CONFIG.model_copy(update={"stage_epochs": (3, 20, 0), "gate_epochs": 15, "learning_rate": 3e-2})
    controller, records = fitted(base, ready, tmp_path, config)
    ce = [r.losses["ce"] for r in records if r.stage == "stage 2"]
    assert ce[-1] < 0.6 * ce[0]
    gate = [r.losses["gate"] for r in records if r.stage == "gate"]
    assert gate[-1] < 0.6 * gate[0]
    boundary = boundary_of(ready.traces, ready.rows.all(), controller.config, base.device)
    logits, _ = controller.weights.router(boundary.z)
    is_edit = boundary.is_edit > 0
    assert logits[is_edit].min() > logits[~is_edit].max(), "training prompts this plain must be told apart"
    assert bool(controller.weights.veto.fitted)
    veto = controller.weights.veto(controller.weights.router.normalise(boundary.z)) > controller.weights.veto.threshold
    assert torch.equal(veto, boundary.is_harmful > 0)


def test_the_fitted_controller_is_frozen_and_the_base_was_never_touched(base, whole):
    controller, _, _ = whole
    assert not any(p.requires_grad for p in controller.weights.parameters())
    fresh = tiny_backbone("llama").model.state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in base.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())


def test_stage_3_moves_the_router_and_leaves_the_experts(base, ready, tmp_path):
    two = CONFIG.model_copy(update={"stage_epochs": (1, 2, 0)})
    before, _ = fitted(base, ready, tmp_path / "two", two)
    after, _ = fitted(base, ready, tmp_path / "three", CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(before.weights.experts.parameters(),
                                                 after.weights.experts.parameters(), strict=True))  # fmt: skip
    assert not torch.equal(before.weights.router.gate.weight, after.weights.router.gate.weight)


def test_two_fits_of_one_seed_are_bit_equal_and_another_seed_differs(base, ready, whole, tmp_path):
    again, _ = fitted(base, ready, tmp_path / "again")
    assert same(again, whole[0])
    other, _ = fitted(base, ready, tmp_path / "other", CONFIG.model_copy(update={"seed": 1}))
    assert not same(other, whole[0])


def test_the_fit_is_the_same_whether_the_prompt_cache_was_kept_or_rebuilt(base, whole, tmp_path):
    rebuilt = prepare(base, TraceStore(tmp_path / "t", budget_gib=0.0), splits(), CONFIG, lambda *_: True)
    assert not (tmp_path / "t" / "prefix").exists()
    _, records = fitted(base, rebuilt, tmp_path / "f")
    for a, b in zip(records, whole[1], strict=True):
        assert a.losses == pytest.approx(b.losses, rel=2e-2, abs=2e-3)


# --- one step, on every architecture ----------------------------------------------------------------------------


@pytest.mark.parametrize("config", [ROUTED, LATE], ids=["early route", "late route"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_step_pushes_every_trained_part_and_no_base_weight(architecture, config, tmp_path):
    backbone = tiny_backbone(architecture)
    ready = prepared(backbone, tmp_path, n_edit=3, n_benign=1, n_harmful=1)
    controller = fresh_controller(backbone, config, 0)
    weights = controller.weights
    with torch.no_grad():
        weights.experts.w_out.normal_(std=0.1)  # past the first step, where every part has a gradient
    boundary = boundary_of(ready.traces, ready.rows.all(), controller.config, backbone.device)
    standardise(weights.router, boundary.z)
    set_residual_sizes(weights.experts, ready.traces, ready.rows)
    chosen = next(epoch_steps(ready.rows, (3, 1, 1), "seed"))
    batch = step_batch(backbone, ready.traces, ready.rows, chosen, 6, controller.config)
    terms = step_losses(backbone, controller, batch, boundary.harmful, CONFIG, anchor=False)
    assert set(terms) == {"ce", "kl", "trajectory", "benign preservation", "harmful preservation", "gate", "margin",
                          "l2"}  # fmt: skip
    torch.stack(list(terms.values())).sum().backward()
    for name, p in weights.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        assert p.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in backbone.model.parameters())


def test_an_untrained_edit_starts_at_the_bases_loss_with_finite_gradients(base, ready):
    controller = fresh_controller(base, ROUTED, 0)
    boundary = boundary_of(ready.traces, ready.rows.all(), controller.config, base.device)
    standardise(controller.weights.router, boundary.z)
    batch = step_batch(base, ready.traces, ready.rows, next(epoch_steps(ready.rows, (3, 2, 2), "s")), 6,
                       controller.config)  # fmt: skip
    terms = step_losses(base, controller, batch, boundary.harmful, CONFIG, anchor=False)
    assert terms["benign preservation"].item() == pytest.approx(0.0, abs=1e-5)
    assert terms["harmful preservation"].item() == pytest.approx(0.0, abs=1e-5)
    assert terms["trajectory"].item() == pytest.approx(CONFIG.weights.trajectory, abs=0.02)
    torch.stack(list(terms.values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in controller.weights.parameters() if p.grad is not None)
    assert controller.weights.experts.w_out.grad.abs().sum() > 0


def test_the_contrastive_warm_up_forces_the_anchor_and_looks_at_nothing_else(base, ready):
    controller = fresh_controller(base, ROUTED, 0)
    chosen = next(epoch_steps(ready.rows, (3, 1, 1), "s"))
    batch = step_batch(base, ready.traces, ready.rows, chosen, 6, controller.config, anchor_only=True)
    anchors = [len(ready.rows.targets[r.id].anchor) for r in chosen[:3]]
    assert batch.mask[:3].sum(1).tolist() == anchors == [4, 4, 4]
    terms = step_losses(base, controller, batch, torch.zeros(0, batch.z.shape[1]), CONFIG, anchor=True)
    assert set(terms) == {"ce", "benign preservation"}


def test_training_edits_what_inference_edits(base, ready):
    """The logits under the training step's soft gate are those of `apply` with a soft gate at the training scale."""
    controller = lively(base, policy=Soft(), scale=CONFIG.train_scale)
    chosen = next(epoch_steps(ready.rows, (3, 1, 1), "s"))
    batch = step_batch(base, ready.traces, ready.rows, chosen, 6, controller.config)
    terms = step_losses(base, controller, batch, torch.zeros(0, batch.z.shape[1]), CONFIG, anchor=False)
    by_id = {p.id: p for p in splits().train}
    prompts = render_batch(base, [by_id[r.id] for r in chosen])
    with controller.apply(base, prompts), torch.no_grad():
        logits = teacher_forced_logits(base, prompts, batch.tokens)
    expected = CONFIG.weights.ce * losses.cross_entropy(logits[:3], batch.tokens[:3], batch.mask[:3])
    assert terms["ce"].item() == pytest.approx(expected.item(), rel=2e-2)  # features are stored in bfloat16


# --- batches ----------------------------------------------------------------------------------------------------


def test_an_epoch_shows_every_edit_row_once_and_its_order_follows_from_the_seed(ready):
    steps = list(epoch_steps(ready.rows, (4, 2, 1), "a"))
    edits = [r.id for s in steps for r in s if r.bucket == Bucket.EDIT]
    assert sorted(edits) == sorted(r.id for r in ready.rows.edit)
    assert [[r.bucket for r in s][-3:] for s in steps] == [[Bucket.BENIGN_KEEP] * 2 + [Bucket.HARMFUL_KEEP]] * 2
    assert steps == list(epoch_steps(ready.rows, (4, 2, 1), "a")) != list(epoch_steps(ready.rows, (4, 2, 1), "b"))


def test_keeps_take_turns_before_any_is_shown_again(ready):
    steps = list(epoch_steps(ready.rows, (2, 1, 1), "a"))
    for bucket in (Bucket.BENIGN_KEEP, Bucket.HARMFUL_KEEP):
        shown = [r.id for s in steps for r in s if r.bucket == bucket]
        assert len(shown) == len(set(shown)) == 3


def test_a_bucket_of_keeps_without_prompts_is_left_out(base, tmp_path):
    without = prepared(base, tmp_path / "t", n_harmful=0)
    assert all(r.bucket != Bucket.HARMFUL_KEEP for s in epoch_steps(without.rows, (3, 1, 1), "a") for r in s)
    controller, records = fitted(base, without, tmp_path / "f")
    assert len(records) == len(EPOCHS)
    assert not bool(controller.weights.veto.fitted)


def test_unusable_targets_are_dropped_and_counted_and_none_left_is_an_error(base, tmp_path):
    store, chosen = TraceStore(tmp_path), splits()
    kept = prepare(base, store, chosen, CONFIG, lambda c, _kind: c.id != "edit-2")
    assert [r.id for r in kept.rows.edit] == [f"edit-{i}" for i in (0, 1, 3, 4, 5)]
    assert len(kept.splits.of(SplitName.TRAIN, Bucket.EDIT)) == 5
    with pytest.raises(TrainingError, match="targets of all 6 training edit prompts refuse, loop or break off"):
        prepare(base, store, chosen, CONFIG, lambda *_: False)


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


def test_a_term_of_zero_weight_does_not_move_the_fit(base, ready):
    silent = CONFIG.model_copy(update={"weights": LossWeights(trajectory=0.0, gate=0.0, harmful_margin=0.0, l2=0.0)})
    controller = fresh_controller(base, ROUTED, 0)
    batch = step_batch(base, ready.traces, ready.rows, next(epoch_steps(ready.rows, (3, 1, 1), "s")), 6,
                       controller.config)  # fmt: skip
    terms = step_losses(base, controller, batch, torch.zeros(0, batch.z.shape[1]), silent, anchor=False)
    assert "trajectory" not in terms and terms["gate"].item() == terms["l2"].item() == 0.0


def test_a_bfloat16_base_trains_float32_weights(tmp_path):
    backbone = tiny_backbone("llama", dtype=torch.bfloat16)
    ready = prepared(backbone, tmp_path / "t")
    controller, records = fitted(backbone, ready, tmp_path / "f")
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in controller.weights.parameters())
    assert len(records) == len(EPOCHS)
