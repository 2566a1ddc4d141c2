"""Read late, edit early: a prefill that decides, and its last token run again for the rows whose gate is open."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache

from paving.backbone.hooks import record_residuals
from paving.controller import AlwaysOpen, Closed, Hard, Oracle, Soft
from paving.controller.paved_model import PavedModel
from paving.prompts.types import Bucket
from tiny_models import LATE, ROUTED, WINDOW, batch_of, decode, hooks_on, lively, logits_of, some_prompts, tiny_backbone

STEPS = 5
WHOLE = {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}


@pytest.fixture
def mixed(backbone):
    return batch_of(backbone, some_prompts()[:4])


@contextmanager
def positions_run(backbone):
    """Columns of every pass through the blocks, in order."""
    seen = []
    handle = backbone.layers[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape[1]))
    try:
        yield seen
    finally:
        handle.remove()


def decoded(backbone, batch, controller, **options):
    with controller.apply(backbone, batch) as applied:
        return decode(backbone.model, batch, n=STEPS, **WHOLE, **options), applied.rows()


@pytest.mark.parametrize(
    "config, policy, extra",
    [(LATE, AlwaysOpen(), [1]), (LATE, Oracle(), [1]), (LATE, Closed(), []), (ROUTED, AlwaysOpen(), [])],
    ids=["late, open", "late, some open", "late, closed", "early"],
)
def test_late_reading_costs_one_decode_step_and_none_where_every_gate_is_closed(backbone, mixed, config, policy, extra):
    with positions_run(backbone) as seen:
        decoded(backbone, mixed, lively(backbone, config, policy=policy))
    assert seen == [mixed.width, *extra, *[1] * (STEPS - 1)]


def test_a_learned_gate_that_agrees_with_the_oracle_gives_its_bits(backbone, mixed):
    labels = [b == Bucket.EDIT for b in mixed.bucket]

    class Agreeing(Hard):  # a learned policy's gate, decided from nothing but the logits' number
        def gate(self, logits, batch):
            return torch.tensor(labels, dtype=torch.float32)

    oracle, oracle_rows = decoded(backbone, mixed, lively(backbone, LATE, policy=Oracle()))
    learned, rows = decoded(backbone, mixed, lively(backbone, LATE, policy=Agreeing()))
    assert torch.equal(learned.sequences, oracle.sequences) and rows == oracle_rows
    assert all(torch.equal(a, b) for a, b in zip(learned.logits, oracle.logits, strict=True))


@pytest.mark.parametrize("config", [ROUTED, LATE], ids=["early", "late"])
@pytest.mark.parametrize(
    "options", [{"prefill_chunk_size": 4}, {"output_hidden_states": True}, {"use_cache": False}], ids=str
)
def test_however_the_prompt_is_run_the_answer_is_the_same(config, options):
    backbone = tiny_backbone()  # one of its own: transformers leaves its recorders of hidden states behind
    batch = batch_of(backbone, some_prompts()[:4])
    controller = lively(backbone, config, policy=Soft())
    plain, rows = decoded(backbone, batch, controller)
    other, other_rows = decoded(backbone, batch, controller, **options)
    torch.testing.assert_close(torch.stack(other.logits), torch.stack(plain.logits), atol=2e-4, rtol=1e-4)
    assert [r.gate for r in other_rows] == pytest.approx([r.gate for r in rows], abs=1e-5)


SLIDING = ["gemma2", "gemma3", "mistral"]


@pytest.mark.parametrize("architecture", SLIDING)
@pytest.mark.parametrize("policy", [AlwaysOpen(), Oracle(), Closed()], ids=["open", "some open", "closed"])
def test_a_window_that_slides_costs_no_more_and_its_cache_is_as_ever(architecture, policy, monkeypatch):
    backbone = tiny_backbone(architecture)
    batch = batch_of(backbone, some_prompts()[:4])
    assert batch.width > WINDOW  # it slides within the prompt
    controller = lively(backbone, LATE, policy=policy)
    base = decode(backbone.model, batch, n=STEPS, **WHOLE)
    with positions_run(backbone) as seen:
        found, rows = decoded(backbone, batch, controller)
    is_open = [r.gate > 0 for r in rows]
    assert seen == [batch.width, *([1] if any(is_open) else []), *[1] * (STEPS - 1)]
    for ours, theirs in zip(found.past_key_values.layers, base.past_key_values.layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape and ours.get_seq_length() == theirs.get_seq_length()
        assert not getattr(ours, "record_past", False)
    for one, other in zip(found.logits, base.logits, strict=True):
        assert [torch.equal(a, b) for a, b in zip(one, other, strict=True)] == [not o for o in is_open]
    monkeypatch.setattr("paving.controller.residual_paving.can_run_again", lambda *_: False)  # a pass of its own decides
    beside, _ = decoded(backbone, batch, controller)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(beside.logits), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", SLIDING)
def test_a_window_that_slides_takes_a_prompt_in_parts(architecture):
    backbone = tiny_backbone(architecture)
    batch = batch_of(backbone, some_prompts()[:4])
    controller = lively(backbone, LATE, policy=Oracle())
    whole, rows = decoded(backbone, batch, controller)
    parts, same = decoded(backbone, batch, controller, prefill_chunk_size=4)
    torch.testing.assert_close(torch.stack(parts.logits), torch.stack(whole.logits), atol=2e-4, rtol=1e-4)
    assert [r.gate for r in rows] == [r.gate for r in same]


def test_a_cache_that_takes_no_token_back_is_read_by_a_pass_of_its_own(monkeypatch):
    backbone = tiny_backbone("gemma3")
    monkeypatch.delattr("transformers.cache_utils.DynamicSlidingWindowLayer.activate_past_recording")  # as once it was
    batch = batch_of(backbone, some_prompts()[:4])
    with positions_run(backbone) as seen:
        decoded(backbone, batch, lively(backbone, LATE, policy=AlwaysOpen()))
    assert seen == [batch.width, batch.width, *[1] * (STEPS - 1)]


def test_several_samples_follow_their_prompts_gate(backbone, mixed):
    controller = lively(backbone, LATE, policy=Oracle())
    paved = PavedModel(backbone, controller)
    options = {"max_new_tokens": STEPS, "do_sample": True, "top_k": 1, "num_return_sequences": 3, "eos_token_id": None}
    with positions_run(backbone) as seen:
        out, rows = paved.generate(
            mixed.input_ids, attention_mask=mixed.attention_mask, bucket=list(mixed.bucket), return_gates=True, **options
        )
    assert seen == [mixed.width, 1, *[1] * (STEPS - 1)] and len(rows) == len(out) == 12
    alone, _ = decoded(backbone, mixed, controller)
    assert torch.equal(out, alone.sequences.repeat_interleave(3, dim=0))


def test_no_hook_is_left_also_after_an_error(backbone, mixed):
    before = hooks_on(backbone.model)
    with pytest.raises(RuntimeError, match="stop"), lively(backbone, LATE, policy=AlwaysOpen()).apply(backbone, mixed):
        decode(backbone.model, mixed)
        raise RuntimeError("stop")
    assert hooks_on(backbone.model) == before == []


def test_the_gates_are_known_before_any_pass(backbone, mixed):
    controller = lively(backbone, LATE, policy=Soft())
    with controller.apply(backbone, mixed) as applied:
        early = applied.rows()
        decode(backbone.model, mixed)
        assert applied.rows() == early
    assert [r.gate for r in early] == pytest.approx([r.gate for r in decoded(backbone, mixed, controller)[1]], abs=1e-5)


@pytest.mark.parametrize("config", [ROUTED, LATE], ids=["early", "late"])
def test_a_multimodal_models_text_is_edited_as_any(config):
    backbone = tiny_backbone("gemma3-multimodal")
    batch = batch_of(backbone, some_prompts()[:4])
    base = decode(backbone.model, batch, n=STEPS, **WHOLE)
    edited, rows = decoded(backbone, batch, lively(backbone, config, policy=AlwaysOpen()))
    assert [r.gate for r in rows] == [1.0] * 4
    for one, other in zip(base.logits, edited.logits, strict=True):
        assert bool(((one - other).abs().amax(1) > 1e-3).all())


def test_blocks_run_past_the_decoder_are_refused(backbone, mixed, monkeypatch):
    monkeypatch.setattr(backbone.model, "get_decoder", torch.nn.Identity)  # a model that names another module than it runs
    with (
        pytest.raises(RuntimeError, match="past its decoder"),
        lively(backbone, ROUTED, policy=AlwaysOpen()).apply(backbone, mixed),
    ):
        logits_of(backbone, mixed)


@pytest.mark.parametrize("config", [ROUTED, LATE], ids=["early", "late"])
def test_what_a_cache_holds_beside_the_batch_shifts_nothing(config):
    """As under prefix tuning: virtual tokens stand in the cache before the first pass."""
    backbone = tiny_backbone()
    batch = batch_of(backbone, some_prompts()[:1])
    filled = DynamicCache()
    virtual = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        backbone.model.get_decoder()(input_ids=virtual, past_key_values=filled, use_cache=True)
    seen = []
    controller = lively(backbone, config, policy=AlwaysOpen())
    with controller.apply(backbone, batch), record_residuals(backbone, [2], keep=lambda r: seen.append(r.clone())):
        backbone.model(input_ids=batch.input_ids, past_key_values=filled, use_cache=True)
    plain = DynamicCache()
    with torch.no_grad():
        backbone.model.get_decoder()(input_ids=virtual, past_key_values=plain, use_cache=True)
        with record_residuals(backbone, [2]) as base:
            backbone.model(input_ids=batch.input_ids, past_key_values=plain, use_cache=True)
    torch.testing.assert_close(seen[0][:, :-1], base[2][:, :-1], atol=1e-5, rtol=1e-5)  # no column before the last is edited
    assert not torch.allclose(seen[-1][:, -1], base[2][:, -1], atol=1e-2)
