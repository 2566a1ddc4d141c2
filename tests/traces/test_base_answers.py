"""Continuations of the base, edit targets, and how far an intervention moves the keeps."""

from __future__ import annotations

import pytest
import torch

from paving.backbone import BackboneError, as_backbone, render_batch, render_ids, render_messages
from paving.backbone.hooks import record_residuals
from paving.controller import AlwaysOpen, Closed, Oracle
from paving.generation import Completion, Decoding, generate
from paving.intervention import Identity
from paving.prompts.types import Bucket
from paving.traces import completions as completions_module
from paving.traces.completions import as_completions, base_continuations
from paving.traces.preservation import continuation_log_prob, keep_divergence
from paving.traces.store import TraceStore
from paving.traces.targets import (
    ANCHOR_PREFIX,
    ANSWER_TEACHER,
    own_targets,
    reference_targets,
    reframe_messages,
    reframe_targets,
    whole_sentences,
)
from tiny_models import decode, lively, prompt, some_prompts, tiny_backbone, tiny_model, tiny_tokenizer

HORIZON = 6


def test_a_continuation_is_the_bases_greedy_answer(backbone, prompts, tmp_path):
    found = base_continuations(backbone, TraceStore(tmp_path), prompts, HORIZON, batch_size=1)
    for p in prompts:
        one = render_batch(backbone, [p])
        tokens = decode(backbone.model, one)[0, one.width :].tolist()
        end = next((i + 1 for i, t in enumerate(tokens) if t in backbone.eos_ids), len(tokens))
        assert found[p.id] == tuple(tokens[:end])


def test_a_stored_longer_continuation_serves_a_shorter_request(backbone, prompts, tmp_path, monkeypatch):
    long = base_continuations(backbone, TraceStore(tmp_path), prompts, HORIZON)
    monkeypatch.setattr(completions_module, "decode", lambda *_a, **_k: pytest.fail("decoded again"))
    seen = []
    short = base_continuations(backbone, TraceStore(tmp_path), prompts, 3, tick=seen.append)
    assert short == {i: tokens[:3] for i, tokens in long.items()}
    assert sum(seen) == len(prompts)


def test_a_stored_shorter_continuation_is_decoded_again_only_where_it_had_not_ended(tmp_path, prompts, monkeypatch):
    backbone = tiny_backbone()
    short = base_continuations(backbone, TraceStore(tmp_path), prompts, 3)
    unended = {i for i, tokens in short.items() if tokens[-1] not in backbone.eos_ids}
    assert 0 < len(unended) < len(prompts), "some answer of this model must end at once, and some must not"
    asked = []
    real = completions_module.decode
    monkeypatch.setattr(completions_module, "decode", lambda b, ids, *a: asked.append(len(ids)) or real(b, ids, *a))
    long = base_continuations(backbone, TraceStore(tmp_path), prompts, HORIZON)
    assert sum(asked) == len(unended)
    assert all(long[i][:3] == short[i] for i in short)


def test_a_models_own_generation_defaults_do_not_reach_its_continuations(prompts, tmp_path):
    biased = as_backbone(tiny_model("llama"), tiny_tokenizer(), "tiny")
    biased.model.generation_config.repetition_penalty = 5.0
    plain = base_continuations(tiny_backbone(), TraceStore(tmp_path / "a"), prompts, HORIZON)
    assert base_continuations(biased, TraceStore(tmp_path / "b"), prompts, HORIZON) == plain
    assert biased.model.generation_config.repetition_penalty == 5.0


def test_continuations_as_completions_are_what_generate_gives(backbone, prompts, tmp_path):
    found = base_continuations(backbone, TraceStore(tmp_path), prompts, HORIZON)
    expected = generate(backbone, prompts, Identity(), Decoding(max_new_tokens=HORIZON))
    assert as_completions(backbone, prompts, found) == expected


def test_a_reframe_target_begins_with_the_anchor_and_goes_on_as_the_teacher_would(backbone, prompts, tmp_path):
    targets = reframe_targets(backbone, TraceStore(tmp_path), prompts[:3], horizon=8)
    assert reframe_targets(backbone, TraceStore(tmp_path), prompts[:3], horizon=8) == targets  # from the store
    anchor = backbone.tokenizer(ANCHOR_PREFIX, add_special_tokens=False)["input_ids"]
    for p in prompts[:3]:
        target = targets[p.id]
        assert target.kind == "reframe" and target.anchor == tuple(anchor)
        assert target.continuation[: len(anchor)] == tuple(anchor) and len(target.continuation) <= 8
        assert list(target.teacher_ids) == render_messages(backbone, reframe_messages(p.text))
        ids = torch.tensor([[*target.teacher_ids, *anchor]])
        with torch.no_grad():
            best = backbone.model(input_ids=ids).logits[0, -1].argmax().item()
        rest = target.continuation[len(anchor) :]
        assert (rest[0] if rest else backbone.tokenizer.eos_token_id) == best


def test_a_horizon_that_the_anchor_fills_is_refused(backbone, prompts, tmp_path):
    with pytest.raises(BackboneError, match="the anchor prefix has 3 tokens; the horizon must be longer than 3"):
        reframe_targets(backbone, TraceStore(tmp_path), prompts[:1], horizon=3)


def test_own_targets_are_the_rows_answers_cut_at_the_horizon_or_ended(backbone):
    long = prompt("a", [1, 2], Bucket.EDIT, target=" ".join(f"w{i}" for i in range(9)))
    short = prompt("b", [1, 2], Bucket.EDIT, target="w3 w4")
    targets = own_targets(backbone, [long, short], horizon=4)
    ids = backbone.tokenizer.convert_tokens_to_ids
    assert targets["a"].continuation == tuple(ids([f"w{i}" for i in range(4)]))
    assert targets["b"].continuation == (*ids(["w3", "w4"]), backbone.tokenizer.eos_token_id)
    assert targets["b"].anchor == targets["b"].continuation
    assert list(targets["a"].teacher_ids) == render_ids(backbone, ANSWER_TEACHER.format(prompt=long.text))


def test_an_edit_prompt_without_its_own_target_is_named(backbone):
    with pytest.raises(ValueError, match=r"1 edit prompts have no target \(first: bare\)"):
        own_targets(backbone, [prompt("bare", [1], Bucket.EDIT)], horizon=4)


def test_a_rows_own_target_goes_before_the_reference_models(backbone):
    own = prompt("own", [1], Bucket.EDIT, target="w5")
    other = prompt("other", [2], Bucket.EDIT)
    answers = [Completion(i, "edit", "", " w7 ", 1, False, 0.0) for i in ("own", "other")]
    targets = reference_targets(backbone, [own, other], answers, horizon=4)
    word = backbone.tokenizer.convert_tokens_to_ids
    assert (targets["own"].kind, targets["own"].continuation[0]) == ("own", word("w5"))
    assert (targets["other"].kind, targets["other"].continuation[0]) == ("reference", word("w7"))


# --- preservation -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(backbone, tmp_path_factory):
    return base_continuations(backbone, TraceStore(tmp_path_factory.mktemp("t")), some_prompts(), HORIZON)


def test_a_closed_gate_diverges_by_exactly_zero(backbone, prompts, answers):
    closed = keep_divergence(backbone, prompts, answers, lively(backbone, policy=Closed()), k=16)
    base = keep_divergence(backbone, prompts, answers, Identity(), k=16)
    assert set(closed.values()) == set(base.values()) == {0.0}
    assert list(sorted(closed)) == sorted(p.id for p in prompts)


@pytest.mark.parametrize("batch_size", [2, 16])
def test_a_closed_row_beside_open_ones_diverges_by_exactly_zero(backbone, prompts, answers, batch_size):
    found = keep_divergence(backbone, prompts, answers, lively(backbone, policy=Oracle()), k=16, batch_size=batch_size)
    for p in prompts:
        assert (found[p.id] == 0.0) == (p.bucket != Bucket.EDIT)
        assert found[p.id] >= 0.0


def test_the_bases_distributions_are_made_once_for_all_interventions(backbone, prompts, answers):
    kept, passes = {}, []
    one, other = (lively(backbone, policy=AlwaysOpen(), scale=s) for s in (1.0, 0.3))
    first = keep_divergence(backbone, prompts, answers, one, k=16, base=kept, batch_size=4)
    with record_residuals(backbone, [0], keep=lambda resid: passes.append(len(resid))):
        second = keep_divergence(backbone, prompts, answers, other, k=16, base=kept, batch_size=4)
    assert sum(passes) == len(prompts) and len(kept) == len(passes)
    assert first == keep_divergence(backbone, prompts, answers, one, k=16, batch_size=4)
    assert second == keep_divergence(backbone, prompts, answers, other, k=16, batch_size=4) != first


def test_the_divergence_is_the_one_of_the_prompt_alone(backbone, prompts, answers):
    controller = lively(backbone, policy=AlwaysOpen())
    together = keep_divergence(backbone, prompts, answers, controller, k=16)
    for p in prompts[:3]:
        alone = keep_divergence(backbone, [p], answers, controller, k=16)
        assert together[p.id] == pytest.approx(alone[p.id], rel=1e-3, abs=1e-4)


def test_the_log_probability_of_a_continuation_is_its_mean_per_token(backbone, prompts, answers):
    found = continuation_log_prob(backbone, prompts, answers, Identity())
    for p in prompts[:4]:
        ids = render_ids(backbone, p.text)
        with torch.no_grad():
            log_probs = backbone.model(input_ids=torch.tensor([[*ids, *answers[p.id]]])).logits[0].log_softmax(-1)
        steps = [log_probs[len(ids) - 1 + t, token].item() for t, token in enumerate(answers[p.id])]
        assert found[p.id] == pytest.approx(sum(steps) / len(steps), abs=1e-4)


class _Words:
    """A backbone as far as `whole_sentences` looks: token ids are places in a list of words."""

    eos_token_id = 0
    words = ("<end>", "Ask", " someone", ".", " Or", " not")

    @property
    def tokenizer(self):
        return self

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


@pytest.mark.parametrize(
    ("tokens", "room", "expected"),
    [
        ([1, 2, 3], 5, [1, 2, 3, 0]),  # the model ended it
        ([1, 2, 3, 4, 5], 5, [1, 2, 3, 0]),  # cut by the room: back to the last whole sentence
        ([1, 2, 4, 5, 2], 5, [1, 2, 4, 5, 2]),  # no sentence ends: as it is, and not ended
    ],
)
def test_a_reframe_ends_where_the_model_or_a_sentence_ended(tokens, room, expected):
    assert whole_sentences(_Words(), tokens, room) == expected
