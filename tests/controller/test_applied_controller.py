"""`apply` on every architecture: what an open gate edits, what a closed one leaves, what is left behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paving.backbone.hooks import record_residuals
from paving.controller import AlwaysOpen, Closed, Hard, Oracle, Soft, ThresholdedSoft
from paving.intervention import Identity, RowState
from paving.prompts.types import Bucket
from paving.traces.forward import pad_right, teacher_forced_logits
from tiny_models import LATE, ROUTED, batch_of, decode, hooks_on, lively, logits_of, some_prompts, tiny_backbone

CONTINUATIONS = ((9, 10, 11, 12), (20, 21, 22, 23), (30, 31, 32, 33), (40, 41, 42, 43))


@pytest.fixture
def mixed(any_backbone):
    """Four prompts of unequal length: edit, benign keep, harmful keep, edit."""
    return batch_of(any_backbone, some_prompts()[:4])


def forced(backbone, batch):
    tokens, _ = pad_right(CONTINUATIONS[: len(batch)], backbone.pad_id, backbone.device)
    with torch.no_grad():
        return teacher_forced_logits(backbone, batch, tokens)


def test_an_open_gate_changes_the_logits_of_every_row(any_backbone, mixed):
    base = forced(any_backbone, mixed)
    with lively(any_backbone, policy=AlwaysOpen()).apply(any_backbone, mixed):
        edited = forced(any_backbone, mixed)
    assert bool(((edited - base).abs().amax((1, 2)) > 1e-2).all())


def test_a_closed_gate_leaves_logits_and_generated_text_bit_for_bit(any_backbone, mixed):
    base_logits = forced(any_backbone, mixed)
    base = decode(any_backbone.model, mixed, output_logits=True, return_dict_in_generate=True)
    closed = lively(any_backbone, policy=Closed())
    with closed.apply(any_backbone, mixed):
        assert torch.equal(forced(any_backbone, mixed), base_logits)
    with closed.apply(any_backbone, mixed) as applied:
        edited = decode(any_backbone.model, mixed, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(edited.sequences, base.sequences)
    assert all(torch.equal(a, b) for a, b in zip(edited.logits, base.logits, strict=True))
    assert [row.gate for row in applied.rows()] == [0.0] * 4


def test_leaving_restores_the_model_bit_for_bit(any_backbone, mixed):
    before = {k: v.clone() for k, v in any_backbone.model.state_dict().items()}
    logits = logits_of(any_backbone, mixed)
    with lively(any_backbone, policy=AlwaysOpen()).apply(any_backbone, mixed):
        decode(any_backbone.model, mixed)
    after = any_backbone.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert hooks_on(any_backbone.model) == []
    assert torch.equal(logits_of(any_backbone, mixed), logits)


@pytest.mark.parametrize("config", [ROUTED, LATE], ids=["early route", "late route"])
def test_rows_with_a_closed_gate_are_the_bases_bits_beside_rows_that_are_edited(any_backbone, mixed, config):
    is_edit = torch.tensor([b == Bucket.EDIT for b in mixed.bucket])
    base = forced(any_backbone, mixed)
    controller = lively(any_backbone, config, policy=Oracle())
    with controller.apply(any_backbone, mixed) as applied:
        edited = forced(any_backbone, mixed)
    assert [row.gate for row in applied.rows()] == is_edit.float().tolist()
    assert torch.equal(edited[~is_edit], base[~is_edit])
    assert bool(((edited - base).abs().amax((1, 2)) > 1e-2)[is_edit].all())


@pytest.mark.parametrize("config", [ROUTED, LATE], ids=["early route", "late route"])
def test_a_keep_decoded_beside_edited_rows_has_the_bases_logits_at_every_step(any_backbone, mixed, config):
    options = {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    base = decode(any_backbone.model, mixed, **options)
    with lively(any_backbone, config, policy=Oracle()).apply(any_backbone, mixed):
        edited = decode(any_backbone.model, mixed, **options)
    keeps = [i for i, b in enumerate(mixed.bucket) if b != Bucket.EDIT]
    edits = [i for i, b in enumerate(mixed.bucket) if b == Bucket.EDIT]
    assert torch.equal(edited.sequences[keeps], base.sequences[keeps])
    for a, b in zip(edited.logits, base.logits, strict=True):
        assert torch.equal(a[keeps], b[keeps])
    for i in edits:
        assert not torch.equal(edited.sequences[i], base.sequences[i])


def test_each_row_of_a_batch_is_as_it_is_alone(any_backbone, mixed):
    controller = lively(any_backbone, policy=Soft())
    with controller.apply(any_backbone, mixed) as applied:
        together = forced(any_backbone, mixed)
    assert len({round(row.gate, 3) for row in applied.rows()}) > 1, "the rows of this test must differ in their gate"
    for i, p in enumerate(some_prompts()[:4]):
        alone = batch_of(any_backbone, [p])
        tokens = torch.tensor([CONTINUATIONS[i]])
        with controller.apply(any_backbone, alone) as single, torch.no_grad():
            logits = teacher_forced_logits(any_backbone, alone, tokens)
        torch.testing.assert_close(logits[0], together[i], atol=2e-4, rtol=1e-4)
        assert single.rows()[0].gate == pytest.approx(applied.rows()[i].gate, abs=1e-5)


def test_prompt_states_before_the_last_token_are_the_bases_at_every_depth(any_backbone, mixed):
    layers = range(any_backbone.n_layers)
    with record_residuals(any_backbone, layers) as base:
        logits_of(any_backbone, mixed)
    controller = lively(any_backbone, policy=AlwaysOpen())
    with controller.apply(any_backbone, mixed), record_residuals(any_backbone, layers) as edited:
        logits_of(any_backbone, mixed)
    real = mixed.attention_mask[:, :-1].bool()
    for layer in layers:
        torch.testing.assert_close(edited[layer][:, :-1][real], base[layer][:, :-1][real], atol=1e-6, rtol=1e-6)
    last = any_backbone.n_layers - 1
    assert not torch.allclose(edited[last][:, -1], base[last][:, -1], atol=1e-2)


@pytest.mark.parametrize("config", [ROUTED, LATE], ids=["early route", "late route"])
def test_decoding_over_the_cache_is_the_teacher_forced_pass_under_the_same_gate(any_backbone, mixed, config):
    controller = lively(any_backbone, config, policy=Soft())
    with controller.apply(any_backbone, mixed):
        out = decode(any_backbone.model, mixed, n=5, output_logits=True, return_dict_in_generate=True,
                     eos_token_id=None)  # fmt: skip
    answer = out.sequences[:, mixed.width :]
    with controller.apply(any_backbone, mixed), torch.no_grad():
        whole = teacher_forced_logits(any_backbone, mixed, answer)
    torch.testing.assert_close(torch.stack(out.logits, dim=1), whole, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", [Soft(), Hard(-0.1), ThresholdedSoft(-0.1), Closed(), AlwaysOpen()], ids=str)
@pytest.mark.parametrize("config", [ROUTED, LATE], ids=["early route", "late route"])
def test_shuffling_the_labels_changes_nothing_but_the_oracle(backbone, config, policy):
    prompts = some_prompts()
    batch = batch_of(backbone, prompts)
    shuffled = replace(batch, bucket=(*batch.bucket[1:], batch.bucket[0]))
    unknown = replace(batch, bucket=(None,) * len(batch))
    assert shuffled.bucket != batch.bucket

    def run(controller, which):
        with controller.apply(backbone, which) as applied:
            return decode(backbone.model, which), applied.rows()

    controller = lively(backbone, config, policy=policy, use_veto=True)
    text, rows = run(controller, batch)
    for other in (shuffled, unknown):
        other_text, other_rows = run(controller, other)
        assert torch.equal(text, other_text)
        assert rows == other_rows
    oracle = controller.with_policy(Oracle())
    assert [r.gate for r in run(oracle, batch)[1]] != [r.gate for r in run(oracle, shuffled)[1]]
    assert not torch.equal(run(oracle, batch)[0], run(oracle, shuffled)[0])


def test_the_oracle_refuses_prompts_without_a_label_and_names_the_first(backbone, batch):
    unlabelled = replace(batch, bucket=(*batch.bucket[:-1], None))
    with (
        pytest.raises(ValueError, match=rf"1 have none \(first: {batch.ids[-1]}\)"),
        lively(backbone, policy=Oracle()).apply(backbone, unlabelled),
    ):
        logits_of(backbone, unlabelled)
    assert hooks_on(backbone.model) == []


def test_an_error_inside_apply_leaves_no_hook_behind(backbone, batch, controller):
    with pytest.raises(KeyError), controller.apply(backbone, batch):
        assert hooks_on(backbone.model)
        raise KeyError
    assert hooks_on(backbone.model) == []


def test_rows_are_not_told_before_the_prompt_was_read(backbone, batch, controller):
    with controller.apply(backbone, batch) as applied, pytest.raises(RuntimeError, match="run the model over the prompt"):
        applied.rows()


def test_a_controller_of_another_base_is_refused_by_name(batch, controller):
    other = tiny_backbone("llama", seed=9)
    with (
        pytest.raises(ValueError, match=r"trained for tiny-llama \(fingerprint [\w-]+\), but the model at hand"),
        controller.apply(other, batch),
    ):
        pass


def test_two_batches_do_not_share_a_gate(backbone, prompts, controller):
    controller = controller.with_policy(Soft())
    one, two = batch_of(backbone, prompts[:2]), batch_of(backbone, prompts[2:4])
    with controller.apply(backbone, one) as first:
        logits_of(backbone, one)
    before = first.rows()
    with controller.apply(backbone, two) as second:
        logits_of(backbone, two)
    assert first.rows() == before
    assert first.rows() != second.rows()


def test_a_bfloat16_model_is_edited_and_its_closed_rows_kept_bit_for_bit():
    backbone = tiny_backbone("llama", dtype=torch.bfloat16)
    batch = batch_of(backbone, some_prompts()[:4])
    base = forced(backbone, batch)
    with lively(backbone, policy=Oracle()).apply(backbone, batch):
        edited = forced(backbone, batch)
    assert edited.dtype == torch.bfloat16
    assert torch.equal(edited[1:3], base[1:3])
    assert not torch.equal(edited[0], base[0])
    assert lively(backbone).weights.experts.w_out.dtype == torch.float32


def test_a_multimodal_models_text_decoder_is_edited():
    backbone = tiny_backbone("gemma3-multimodal")
    batch = batch_of(backbone, some_prompts()[:4])
    base = forced(backbone, batch)
    for config in (ROUTED, LATE):
        with lively(backbone, config, policy=Oracle()).apply(backbone, batch):
            edited = forced(backbone, batch)
        assert torch.equal(edited[1:3], base[1:3])
        assert not torch.allclose(edited[0], base[0], atol=1e-2)


def test_the_identity_touches_nothing_and_says_so(backbone, batch):
    before = logits_of(backbone, batch)
    with Identity().apply(backbone, batch) as applied:
        assert hooks_on(backbone.model) == []
        assert torch.equal(logits_of(backbone, batch), before)
    assert applied.rows() == (RowState(gate=0.0),) * len(batch)
