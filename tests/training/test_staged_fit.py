"""The staged fit on a tiny model: it learns, is fixed by its seed, and never touches the base."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from paving.backbone import render_batch
from paving.controller import SingleExpert, Soft, fresh_controller
from paving.prompts.types import Bucket, SplitName
from paving.traces.forward import teacher_forced_logits
from paving.traces.store import TraceStore
from paving.training import losses
from paving.training.checkpoint import TrainingError
from paving.training.config import LossWeights
from paving.training.data import boundary_of, epoch_steps, step_batch
from paving.training.prepare import prepare, repeats
from paving.training.stages import schedule, set_residual_sizes, standardise, step_losses
from tiny_fits import CONFIG, EPOCHS, answered, fitted, prepared, same, splits
from tiny_models import ARCHITECTURES, LATE, ROUTED, lively, tiny_backbone

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


def test_a_fixed_expert_is_the_only_one_that_learns_and_is_deployed(base, ready, tmp_path):
    controller = fresh_controller(base, ROUTED, 0, "expert:1")
    assert controller.mixture == SingleExpert(1)
    before = controller.weights.experts.w_out.detach().clone()  # (edited layers, K, width, d_model)
    config = CONFIG.model_copy(update={"mixture": "expert:1", "weights": CONFIG.weights.model_copy(update={"l2": 0.0})})
    trained, _ = fitted(base, ready, tmp_path, config, controller=controller)
    after = trained.weights.experts.w_out
    assert [not torch.equal(after[:, k], before[:, k]) for k in range(3)] == [False, True, False]
    assert trained.mixture == SingleExpert(1)


def test_two_fits_of_one_seed_are_bit_equal_and_another_seed_differs(base, ready, whole, tmp_path):
    again, _ = fitted(base, ready, tmp_path / "again")
    assert same(again, whole[0])
    other, _ = fitted(base, ready, tmp_path / "other", CONFIG.model_copy(update={"seed": 1}))
    assert not same(other, whole[0])


def test_the_fit_is_the_same_whether_the_prompt_cache_was_kept_or_rebuilt(base, whole, tmp_path):
    rebuilt = prepare(base, TraceStore(tmp_path / "t", budget_gib=0.0), splits(), CONFIG, answered)
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
    kept = prepare(
        base, store, chosen, CONFIG, lambda cs: ["HARMLESS-REFUSAL" if c.id == "edit-2" else "HARMLESS-BENIGN" for c in cs]
    )
    assert [r.id for r in kept.rows.edit] == [f"edit-{i}" for i in (0, 1, 3, 4, 5)]
    assert len(kept.splits.of(SplitName.TRAIN, Bucket.EDIT)) == 5
    with pytest.raises(TrainingError, match="targets of all 6 training edit prompts refuse, loop or break off"):
        prepare(base, store, chosen, CONFIG, lambda cs: ["HARMLESS-BROKEN"] * len(cs))


def test_a_target_that_repeats_itself_is_dropped_whatever_the_judge_says(base, tmp_path):
    assert repeats((1, 2, 3, 4, 5, 6) * 2) and not repeats((1, 2, 3, 4, 5) * 2) and not repeats(())
    chosen = splits()
    looping = replace(chosen.train[0], target=" ".join([f"w{i}" for i in range(150, 153)] * 3))
    chosen = replace(chosen, train=(looping, *chosen.train[1:]))
    kept = prepare(base, TraceStore(tmp_path), chosen, CONFIG.model_copy(update={"horizon": 9}), answered)
    assert [r.id for r in kept.rows.edit] == [f"edit-{i}" for i in range(1, 6)]


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
