"""(backbone, prompts, intervention) -> completions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paving.backbone import BackboneError, as_backbone, render_batch
from paving.controller import AlwaysOpen, Closed, Oracle, Soft
from paving.generation import Completion, Decoding, generate, load_completions, save_completions
from paving.intervention import Identity
from paving.prompts.types import Bucket
from tiny_models import decode, lively, prompt, some_prompts, tiny_backbone, tiny_model, tiny_tokenizer

SHORT = Decoding(max_new_tokens=6)


def test_completions_come_in_the_order_of_the_prompts_whatever_the_batching(backbone, prompts):
    for batch_size in (1, 3, 32):
        done = generate(backbone, prompts, Identity(), SHORT, batch_size=batch_size)
        assert [c.id for c in done] == [p.id for p in prompts]
        assert [(c.bucket, c.prompt) for c in done] == [(p.bucket.value, p.text) for p in prompts]


def test_an_answer_is_the_models_own_greedy_text(backbone, prompts):
    for c, p in zip(generate(backbone, prompts, Identity(), SHORT, batch_size=1), prompts, strict=True):
        one = render_batch(backbone, [p])
        tokens = decode(backbone.model, one)[0, one.width :]
        assert c.response == backbone.tokenizer.decode(tokens, skip_special_tokens=True)


def test_no_prompts_give_no_completions(backbone):
    assert generate(backbone, [], Identity(), SHORT) == []


def ending_early(prompts):
    """A backbone whose greedy answer to the fifth prompt ends after a few tokens, and after how many."""
    model = tiny_model("llama")
    backbone = as_backbone(model, tiny_tokenizer(), "tiny")
    one = render_batch(backbone, prompts[4:5])
    tokens = decode(model, one, eos_token_id=None)[0, one.width :].tolist()
    end = next(i for i, t in enumerate(tokens) if i > 0 and t not in tokens[:i])
    model.generation_config.eos_token_id = [2, tokens[end]]
    return as_backbone(model, tiny_tokenizer(), "tiny"), end


def test_an_ended_answer_is_told_from_one_that_was_cut(prompts):
    backbone, end = ending_early(prompts)
    ended = generate(backbone, prompts[4:5], Identity(), SHORT)[0]
    assert (ended.truncated, ended.n_tokens) == (False, end)
    cut = generate(backbone, prompts[4:5], Identity(), Decoding(max_new_tokens=end))[0]
    assert (cut.truncated, cut.n_tokens) == (True, end)
    assert cut.response == ended.response


@pytest.mark.parametrize(
    "default",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 6},
        {"suppress_tokens": list(range(3, 150))},
        {"bad_words_ids": [[i] for i in range(3, 150)]},
        {"begin_suppress_tokens": list(range(3, 150))},
        {"forced_eos_token_id": 2},
        {"do_sample": True, "temperature": 3.0, "top_k": 3},
        {"max_length": 8},
    ],
    ids=lambda d: next(iter(d)),
)
def test_a_models_own_generation_defaults_cannot_change_a_measurement(prompts, default):
    plain, _ = ending_early(prompts)
    biased, _ = ending_early(prompts)
    for name, value in default.items():
        setattr(biased.model.generation_config, name, value)
    a, b = (generate(x, prompts, Identity(), SHORT) for x in (plain, biased))
    assert [c.response for c in a] == [c.response for c in b]


def test_sampling_is_fixed_by_its_seed(backbone, prompts):
    def sampled(seed):
        decoding = Decoding(max_new_tokens=6, do_sample=True, temperature=1.5, seed=seed)
        return [c.response for c in generate(backbone, prompts, Identity(), decoding)]

    assert sampled(1) == sampled(1) != sampled(2)


def test_every_row_carries_what_was_decided_for_it(backbone, prompts):
    done = generate(backbone, prompts, lively(backbone, policy=Oracle()), SHORT, batch_size=3)
    assert [c.gate for c in done] == [float(p.bucket == Bucket.EDIT) for p in prompts]
    soft = generate(backbone, prompts, lively(backbone, policy=Soft(), use_veto=True), SHORT, batch_size=3)
    assert all(c.logit is not None and c.veto is not None and len(c.mixture) == 3 for c in soft)
    base = generate(backbone, prompts, Identity(), SHORT)
    assert all((c.gate, c.logit, c.veto, c.mixture) == (0.0, None, None, None) for c in base)


@pytest.mark.parametrize("policy", [Closed(), Oracle(), Soft(), AlwaysOpen()], ids=lambda p: p.name)
def test_taking_closed_batches_from_the_base_gives_the_text_of_decoding_them(backbone, prompts, policy):
    keeps_first = sorted(prompts, key=lambda p: p.bucket == Bucket.EDIT)
    controller = lively(backbone, policy=policy)
    for chosen in (keeps_first, [p for p in prompts if p.bucket != Bucket.EDIT]):
        base = {c.id: c for c in generate(backbone, chosen, Identity(), SHORT, batch_size=2)}
        slow = generate(backbone, chosen, controller, SHORT, batch_size=2)
        quick = generate(backbone, chosen, controller, SHORT, batch_size=2, known=[base])
        assert quick == slow


def test_a_closed_batch_is_not_decoded_again(backbone, prompts):
    keeps = [p for p in prompts if p.bucket != Bucket.EDIT]
    base = {c.id: c for c in generate(backbone, keeps, Identity(), SHORT)}
    marked = {i: replace(c, response="from the base's completions") for i, c in base.items()}
    done = generate(backbone, keeps, lively(backbone, policy=Oracle()), SHORT, known=[marked])
    assert {c.response for c in done} == {"from the base's completions"}
    assert all(c.logit is not None for c in done), "the decision is the controller's own all the same"


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused_by_id(backbone):
    long = prompt("nearly-full", [1] * 248, Bucket.EDIT)
    with pytest.raises(BackboneError, match="nearly-full"):
        generate(backbone, [long], Identity(), SHORT)


def test_the_tick_counts_every_prompt_once(backbone, prompts):
    seen = []
    generate(backbone, prompts, Identity(), SHORT, batch_size=3, tick=seen.append)
    assert seen == [3, 3, 2]


def test_saved_completions_come_back_as_they_were(backbone, prompts, tmp_path):
    done = generate(backbone, prompts, lively(backbone, use_veto=True), SHORT)
    done.append(Completion("ü/1", "edit", "a\nb", "„quoted“\u2028 line", 3, True, 0.0))
    save_completions(done, tmp_path / "deep" / "rows.jsonl")
    assert load_completions(tmp_path / "deep" / "rows.jsonl") == done
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["rows.jsonl"]


def test_decoding_that_makes_no_sense_is_refused():
    for wrong in ({"max_new_tokens": 0}, {"temperature": 0.0}, {"top_p": 1.5}, {"num_beams": 2}):
        with pytest.raises(ValueError):
            Decoding(**wrong)


def test_bfloat16_completions_keep_closed_rows_as_the_bases():
    backbone = tiny_backbone(dtype=torch.bfloat16)
    prompts = some_prompts()
    base = generate(backbone, prompts, Identity(), SHORT)
    oracle = generate(backbone, prompts, lively(backbone, policy=Oracle()), SHORT)
    for a, b, p in zip(base, oracle, prompts, strict=True):
        assert (a.response == b.response) == (p.bucket != Bucket.EDIT)
