"""CAST and WS fitted on edit targets against the base's refusals, as comparators of Residual Paving."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paving.backbone import render_batch, render_ids
from paving.backbone.hooks import record_residuals
from paving.prompts.types import Bucket, SplitName, Splits
from paving.steering.behaviour import BehaviourConfig
from paving.steering.cast import fit_answer_cast
from paving.steering.checks import SteeringError
from paving.steering.material import Material, answered
from paving.steering.states import tail_means
from paving.steering.steered import Steered
from paving.steering.weight_steering import WeightEditor, WeightSteeringConfig, fit_answer_weights
from paving.traces.forward import teacher_forced_logits
from tiny_models import logits_of, prompt, tiny_backbone

WORD = {Bucket.EDIT: 1, Bucket.BENIGN_KEEP: 60, Bucket.HARMFUL_KEEP: 120}
ROWS = tuple(prompt(f"{b.value}{i}", [w] * (4 + i) + [170 + i], b) for b, w in WORD.items() for i in range(5))
REFUSAL, TARGET = (150, 151, 152), (40, 41, 42, 43)


def material() -> Material:
    edit = [p.id for p in ROWS if p.bucket is Bucket.EDIT]
    return Material(Splits(ROWS, ROWS, ()), dict.fromkeys(edit, TARGET), {p.id: REFUSAL for p in ROWS})


def log_prob(backbone, rows, tokens) -> float:
    """Mean log-probability of the tokens as the answer of every row."""
    forced = torch.tensor([tokens] * len(rows))
    with torch.no_grad():
        logits = teacher_forced_logits(backbone, render_batch(backbone, rows), forced)
    return logits.log_softmax(-1).gather(-1, forced[..., None]).mean().item()


def test_cast_opens_on_edit_prompts_alone_and_moves_them_from_refusal_towards_the_target():
    backbone = tiny_backbone()
    cast = fit_answer_cast(backbone, material(), BehaviourConfig(layers=(3,), read="last"))
    behaviour, condition = cast.behaviour, cast.condition
    batch = render_batch(backbone, ROWS)
    base, edit = logits_of(backbone, batch), [p.bucket is Bucket.EDIT for p in ROWS]
    assert behaviour.gaps[3] > 0
    for towards, answer in ((True, TARGET), (False, REFUSAL)):
        rows = [render_ids(backbone, p.text) + list(answer) for p in ROWS[:5]]
        means = tail_means(backbone, rows, [1] * 5, (3,), batch_size=5)[:, 0].mean(0)
        other = [render_ids(backbone, p.text) + list(REFUSAL if towards else TARGET) for p in ROWS[:5]]
        others = tail_means(backbone, other, [1] * 5, (3,), batch_size=5)[:, 0].mean(0)
        assert ((means - others) @ behaviour.vectors[3] > 0) == towards
    assert behaviour.vectors[3].norm().item() == pytest.approx(behaviour.gaps[3], rel=1e-4)
    steered = Steered("cast", cast, condition, 1.5, backbone.name, backbone.fingerprint)
    with record_residuals(backbone, [3]) as untouched:
        logits_of(backbone, batch)
    with steered.apply(backbone, batch) as applied, record_residuals(backbone, [3]) as seen:
        logits_of(backbone, batch)
        assert [bool(s.gate) for s in applied.rows()] == edit
    moved = (seen[3] - untouched[3])[:, -1]
    torch.testing.assert_close(moved, torch.tensor(edit)[:, None] * 1.5 * behaviour.vectors[3], atol=1e-5, rtol=0)
    assert torch.equal(logits_of(backbone, batch), base)


def test_a_target_that_ends_points_to_no_end_of_turn():
    backbone = tiny_backbone()
    end = next(iter(backbone.eos_ids))
    plain = material()
    ended = replace(plain, targets={i: (*TARGET, end) for i in plain.targets})
    config = BehaviourConfig(layers=(3,), read="last")
    with_end, without = (fit_answer_cast(backbone, m, config).behaviour.vectors[3] for m in (ended, plain))
    assert torch.equal(with_end, without)


def test_ws_learns_the_target_and_unlearns_the_refusal():
    backbone = tiny_backbone()
    delta = fit_answer_weights(backbone, material(), WeightSteeringConfig(epochs=4, learning_rate=3e-3, packing=False))
    assert set(delta.losses) == {"refusal", "edit target"} and all(v[-1] < v[0] for v in delta.losses.values())
    edit = [p for p in ROWS if p.bucket is Bucket.EDIT]
    batch = render_batch(backbone, edit)
    base, before = logits_of(backbone, batch), log_prob(backbone, edit, TARGET) - log_prob(backbone, edit, REFUSAL)
    with WeightEditor(delta).editing(backbone, batch, torch.ones(5)):
        assert log_prob(backbone, edit, TARGET) - log_prob(backbone, edit, REFUSAL) > before + 0.5
    assert torch.equal(logits_of(backbone, batch), base)


def test_weights_cannot_be_edited_for_some_rows_only():
    backbone = tiny_backbone()
    delta = fit_answer_weights(backbone, material(), WeightSteeringConfig(epochs=1, packing=False))
    batch = render_batch(backbone, ROWS[:2])
    with (
        pytest.raises(SteeringError, match="every row of a batch alike"),
        WeightEditor(delta).editing(backbone, batch, torch.tensor([0.0, 1.0])),
    ):
        pass


def test_an_answer_can_be_cut_to_its_opening():
    backbone = tiny_backbone()
    some = material()
    prompts = some.of(SplitName.TRAIN, Bucket.EDIT)
    assert {tuple(e.answer) for e in answered(backbone, prompts, some.targets, length=2)} == {TARGET[:2]}
    assert {tuple(e.answer) for e in answered(backbone, prompts, some.targets)} == {TARGET}
