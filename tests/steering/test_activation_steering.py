"""AS: what is added, where, and what is left behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_steering import OPENINGS, PAIRS, behaviour

from paving.backbone.hooks import record_residuals
from paving.generation import Decoding, generate
from paving.intervention import Identity
from paving.steering import ActivationSteering, BehaviourConfig, SteeringError, fit_activation_steering, fit_behaviour
from paving.traces.forward import pad_right, teacher_forced_logits
from tiny_models import batch_of, decode, hooks_on, logits_of, some_prompts, tiny_backbone

STRONG = 6.0


@pytest.fixture
def mixed(any_backbone):
    return batch_of(any_backbone, some_prompts()[:4])


def steering(backbone, strength=STRONG, **changes):
    return ActivationSteering(behaviour(backbone, **changes), strength)


def forced(backbone, batch):
    tokens, _ = pad_right([(9 + i, 10, 11, 12) for i in range(len(batch))], backbone.pad_id, backbone.device)
    with torch.no_grad():
        return teacher_forced_logits(backbone, batch, tokens)


@pytest.mark.parametrize("positions", ["all", "answer"])
def test_the_state_moves_by_exactly_s_v_at_the_chosen_layer_and_positions(any_backbone, mixed, positions):
    chosen = steering(any_backbone, layers=(2,), positions=positions)
    with record_residuals(any_backbone, (1, 2)) as base:
        forced(any_backbone, mixed)
    with chosen.apply(any_backbone, mixed), record_residuals(any_backbone, (1, 2)) as edited:
        forced(any_backbone, mixed)
    first = 0 if positions == "all" else mixed.width - 1
    expected = base[2].clone()
    expected[:, first:] += STRONG * chosen.behaviour.vectors[2]
    assert expected.shape[1] == mixed.width + 3
    assert torch.equal(edited[2], expected)
    assert torch.equal(edited[1], base[1])


@pytest.mark.parametrize("positions", ["all", "answer"])
def test_decoding_over_the_cache_edits_as_one_pass_does(any_backbone, mixed, positions):
    chosen = steering(any_backbone, positions=positions)
    options = {"n": 5, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    with chosen.apply(any_backbone, mixed):
        out = decode(any_backbone.model, mixed, **options)
    with chosen.apply(any_backbone, mixed), torch.no_grad():
        whole = teacher_forced_logits(any_backbone, mixed, out.sequences[:, mixed.width :])
    torch.testing.assert_close(torch.stack(out.logits, dim=1), whole, atol=2e-4, rtol=1e-4)
    base = decode(any_backbone.model, mixed, **options)
    assert not torch.allclose(base.logits[0], out.logits[0], atol=1e-2)


def test_strength_0_leaves_the_base_bit_for_bit_and_says_so(any_backbone, mixed):
    base = forced(any_backbone, mixed)
    with steering(any_backbone, 0.0).apply(any_backbone, mixed) as applied:
        assert hooks_on(any_backbone.model) == []
        assert torch.equal(forced(any_backbone, mixed), base)
    assert [row.gate for row in applied.rows()] == [0.0] * len(mixed)
    with steering(any_backbone).apply(any_backbone, mixed) as applied:
        assert not torch.equal(forced(any_backbone, mixed), base)
    assert [row.gate for row in applied.rows()] == [1.0] * len(mixed)


def test_a_strength_is_swept_by_replacing_it(backbone, batch):
    weak, strong = steering(backbone, 0.5), replace(steering(backbone, 0.5), strength=STRONG)
    base = logits_of(backbone, batch)
    moved = []
    for chosen in (weak, strong):
        with chosen.apply(backbone, batch):
            moved.append(float((logits_of(backbone, batch) - base).norm()))
    assert 0 < moved[0] < moved[1]


def test_leaving_restores_the_model_also_after_an_error(backbone, batch):
    before = logits_of(backbone, batch)
    with pytest.raises(KeyError), steering(backbone).apply(backbone, batch):
        assert hooks_on(backbone.model)
        raise KeyError
    assert hooks_on(backbone.model) == []
    assert torch.equal(logits_of(backbone, batch), before)


def test_each_row_of_a_batch_is_as_it_is_alone(any_backbone, mixed):
    with steering(any_backbone).apply(any_backbone, mixed):
        together = logits_of(any_backbone, mixed)[:, -1]
    for i, p in enumerate(some_prompts()[:4]):
        alone = batch_of(any_backbone, [p])
        with steering(any_backbone).apply(any_backbone, alone):
            torch.testing.assert_close(logits_of(any_backbone, alone)[0, -1], together[i], atol=2e-4, rtol=1e-4)


def test_no_label_is_read(backbone, batch):
    texts = []
    for bucket in (batch.bucket, (*batch.bucket[1:], batch.bucket[0]), (None,) * len(batch)):
        labelled = replace(batch, bucket=bucket)
        with steering(backbone).apply(backbone, labelled):
            texts.append(decode(backbone.model, labelled))
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_several_samples_a_prompt_are_edited(backbone, batch):
    with steering(backbone, positions="answer").apply(backbone, batch):
        out = decode(backbone.model, batch, do_sample=True, num_return_sequences=2)
    assert len(out) == 2 * len(batch)


def test_it_decodes_through_generate_and_answers_otherwise_than_the_base(backbone, prompts):
    base, done = (generate(backbone, prompts, i, Decoding(max_new_tokens=6)) for i in (Identity(), steering(backbone)))
    assert all(c.gate == 1.0 for c in done)
    assert sum(a.response != b.response for a, b in zip(base, done, strict=True)) >= len(prompts) // 2


def test_a_bfloat16_base_stays_bfloat16(prompts):
    backbone = tiny_backbone(dtype=torch.bfloat16)
    batch = batch_of(backbone, prompts)
    with steering(backbone).apply(backbone, batch), record_residuals(backbone, (2,)) as seen:
        assert logits_of(backbone, batch).dtype == torch.bfloat16
    assert seen[2].dtype == torch.bfloat16


def test_fitting_it_takes_the_benign_sides(backbone):
    config = BehaviourConfig(layers=(2,), positions="answer")
    fitted = fit_activation_steering(backbone, PAIRS, OPENINGS, config)
    expected = fit_behaviour(backbone, [benign for _, benign in PAIRS], OPENINGS, config)
    assert torch.equal(fitted.behaviour.vectors[2], expected.vectors[2])
    assert fitted.behaviour.positions == "answer" and fitted.name == "as"


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_a_strength_that_would_take_refusals_away_is_refused(backbone, strength):
    with pytest.raises(SteeringError, match="must be 0 or more"):
        steering(backbone, strength)


def test_another_base_is_refused(backbone, batch):
    other = tiny_backbone(seed=1)
    with pytest.raises(ValueError, match="was fitted on tiny-llama"), steering(backbone).apply(other, batch):
        pass
