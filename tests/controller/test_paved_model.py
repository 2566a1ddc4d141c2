"""A paved model takes what `generate` and a call of the model take; each row keeps its own gate."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, TextStreamer

import paving
from paving.backbone import as_backbone, render_batch
from paving.backbone.chat import TEMPLATE_ARGUMENTS
from paving.backbone.hooks import edit_residuals
from paving.controller import AlwaysOpen, Closed, ControllerConfig, Oracle, PavedModel, Soft, ThresholdedSoft
from paving.controller.store import read_description, save_controller
from paving.prompts.types import Bucket
from tiny_models import LATE, ROUTED, batch_of, decode, hooks_on, lively, prompt, tiny_backbone, tiny_model, tiny_tokenizer


def paved(backbone, policy, config: ControllerConfig = ROUTED, **changes) -> PavedModel:
    return PavedModel(backbone, lively(backbone, config, policy=policy, **changes))


def median_logit(backbone, batch, config=ROUTED) -> float:
    rows = paved(backbone, Soft(), config).gates(batch.input_ids, batch.attention_mask)
    return torch.tensor([r.logit for r in rows]).median().item()


def test_what_was_promised_is_saved_again_with_a_loaded_controller(tmp_path):
    backbone = tiny_backbone()
    save_controller(lively(backbone), tmp_path / "first", {"trained_on": {"promises": ["At most 5%"], "dtype": "float32"}})
    loaded = paving.load(backbone.model, tokenizer=backbone.tokenizer, controller=tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    assert read_description(tmp_path / "second")["trained_on"]["promises"] == ["At most 5%"]
    assert "At most 5%" in (tmp_path / "second" / "README.md").read_text(encoding="utf-8")


def test_inputs_are_rendered_as_training_renders_prompts():
    # A template as Qwen3's: what opens behind the prompt depends on an argument that a bare tokenizer call leaves out.
    backbone = tiny_backbone()  # one of this test's own: its template changes
    backbone.tokenizer.chat_template += "{{ ' w5' if enable_thinking | default(true) else ' w6' }}"
    prompts = [prompt("a", (1, 2, 3), Bucket.EDIT), prompt("b", (4,), Bucket.EDIT)]
    found, wanted = paved(backbone, Soft()).inputs_of([p.text for p in prompts]), render_batch(backbone, prompts)
    assert torch.equal(found["input_ids"], wanted.input_ids) and torch.equal(found["attention_mask"], wanted.attention_mask)
    bare = backbone.tokenizer.apply_chat_template([{"role": "user", "content": "w4"}], add_generation_prompt=True)[
        "input_ids"
    ]
    assert (
        bare != wanted.input_ids[1][wanted.attention_mask[1] > 0].tolist() and TEMPLATE_ARGUMENTS["enable_thinking"] is False
    )


def test_inputs_begin_with_the_system_prompt_that_was_fitted_behind_unless_they_bring_one(backbone):
    model = PavedModel(backbone, lively(backbone), {"system": "w9"})
    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}, {"role": "user", "content": "w3"}]
    own = [{"role": "system", "content": "w8"}, *talk]
    texts = model.tokenizer.batch_decode(model.inputs_of(["w1", talk, own])["input_ids"])
    assert [t.replace("<pad>", "").split().count("w9") for t in texts] == [1, 1, 0] and "w8" in texts[2].split()
    for nothing in ([], "w1"):
        with pytest.raises(ValueError, match="needs a list of texts or conversations"):
            model.inputs_of(nothing)


@pytest.mark.parametrize("config", [ROUTED, LATE], ids=["early route", "late route"])
def test_rows_below_the_threshold_get_the_bases_text_beside_rows_that_are_edited(backbone, batch, config):
    base = decode(backbone.model, batch, eos_token_id=None)
    model = paved(backbone, ThresholdedSoft(median_logit(backbone, batch, config)), config)
    text, rows = decode(model, batch, eos_token_id=None, return_gates=True)
    is_open = torch.tensor([r.gate > 0 for r in rows])
    assert 0 < int(is_open.sum()) < len(batch)
    assert torch.equal(text[~is_open], base[~is_open])
    assert all(not torch.equal(text[i], base[i]) for i in is_open.nonzero().flatten().tolist())
    assert hooks_on(backbone.model) == []


def test_true_labels_steer_the_oracle_and_only_the_oracle(backbone, batch):
    base = decode(backbone.model, batch, eos_token_id=None)
    text = decode(paved(backbone, Oracle()), batch, bucket=list(batch.bucket), eos_token_id=None)
    keeps = [i for i, b in enumerate(batch.bucket) if b != Bucket.EDIT]
    assert torch.equal(text[keeps], base[keeps])
    assert not torch.equal(text, base)
    with pytest.raises(ValueError, match="needs the true bucket of every prompt"):
        decode(paved(backbone, Oracle()), batch)


def test_sampling_is_fixed_by_the_seed_and_a_closed_gate_samples_what_the_base_samples(backbone, batch):
    options = {"do_sample": True, "temperature": 1.3, "top_k": 0, "eos_token_id": None}

    def sampled(model):
        torch.manual_seed(11)
        return decode(model, batch, **options)

    assert torch.equal(sampled(paved(backbone, Closed())), sampled(backbone.model))
    assert torch.equal(sampled(paved(backbone, Soft())), sampled(paved(backbone, Soft())))
    assert not torch.equal(sampled(paved(backbone, AlwaysOpen())), sampled(backbone.model))


@pytest.mark.parametrize("config", [ROUTED, LATE], ids=["early route", "late route"])
def test_several_samples_of_a_prompt_share_its_gate(backbone, batch, config):
    threshold = median_logit(backbone, batch, config)
    model = paved(backbone, ThresholdedSoft(threshold), config)
    single = [r.gate for r in model.gates(batch.input_ids, batch.attention_mask)]

    def sampled(which, **more):
        torch.manual_seed(3)
        return decode(which, batch, do_sample=True, num_return_sequences=2, eos_token_id=None, **more)

    text, rows = sampled(model, return_gates=True)
    base = sampled(backbone.model)
    assert len(rows) == len(text) == 2 * len(batch)
    assert [r.gate for r in rows] == pytest.approx([g for g in single for _ in range(2)], abs=1e-5)
    closed = torch.tensor([r.gate == 0 for r in rows])
    assert torch.equal(text[closed], base[closed])
    assert not torch.equal(text[~closed], base[~closed])


class Collector(TextStreamer):
    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text


def test_a_stream_is_the_text_that_generate_returns(backbone, prompts):
    one = batch_of(backbone, prompts[:1])
    model = paved(backbone, AlwaysOpen())
    streamer = Collector(backbone.tokenizer)
    text = decode(model, one, eos_token_id=None, streamer=streamer)
    assert streamer.text.split() == backbone.tokenizer.decode(text[0, one.width :]).split()
    assert not torch.equal(text, decode(backbone.model, one, eos_token_id=None))


def two_turns(model, backbone, first, more: list[int], n: int = 4, **options):
    """The second turn's input ids, both answers, and the second turn's logits; the cache of turn one is gone on from."""
    options = {"eos_token_id": None, "return_dict_in_generate": True, "output_logits": True, **options}
    one = decode(model, first, n=n, **options)
    conversation = torch.cat([one.sequences, torch.tensor([more])], dim=1)
    two = model.generate(
        input_ids=conversation,
        attention_mask=torch.ones_like(conversation),
        past_key_values=one.past_key_values,
        max_new_tokens=n,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return conversation, one, two


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_second_turn_goes_on_from_the_first_ones_cache(architecture, prompts):
    from tiny_models import tiny_backbone

    backbone = tiny_backbone(architecture)
    first = batch_of(backbone, prompts[:1])
    more, n = [2, 4, 30, 31, 32, 2, 5], 4

    _, _, base = two_turns(backbone.model, backbone, first, more)
    _, _, closed = two_turns(paved(backbone, Closed()), backbone, first, more)
    assert torch.equal(closed.sequences, base.sequences)

    controller = lively(backbone, policy=AlwaysOpen())
    conversation, _, two = two_turns(PavedModel(backbone, controller), backbone, first, more)
    assert not torch.equal(two.sequences, base.sequences)

    # By hand: one pass over everything, edited from the last prompt token of a turn until its answer's last but one.
    with torch.no_grad():
        _, mixture = controller.weights.router(features_of(backbone, controller, first.input_ids))
        _, mixture_2 = controller.weights.router(features_of(backbone, controller, conversation))
    edited = [
        (slice(first.width - 1, first.width + n - 1), controller.weights.experts.edits(mixture, torch.float32)),
        (slice(conversation.shape[1] - 1, None), controller.weights.experts.edits(mixture_2, torch.float32)),
    ]

    def by_hand(layer):
        def edit(resid):
            resid = resid.clone()
            for columns, edits in edited:
                resid[:, columns] = edits[layer](resid[:, columns])
            return resid

        return edit

    layers = edited[0][1].keys()
    with edit_residuals(backbone, {layer: by_hand(layer) for layer in layers}), torch.no_grad():
        logits = backbone.model(input_ids=two.sequences[:, :-1], logits_to_keep=n).logits
    torch.testing.assert_close(torch.stack(two.logits, dim=1), logits, atol=5e-4, rtol=1e-3)


def features_of(backbone, controller, ids):
    from paving.backbone import PromptBatch
    from paving.controller.residual_paving import boundary_features

    return boundary_features(backbone, PromptBatch(ids, torch.ones_like(ids), ("",), (None,)), controller.config)


def test_the_gate_of_a_second_turn_is_the_one_of_the_whole_conversation(backbone, prompts):
    model = paved(backbone, Soft())
    conversation, _, _ = two_turns(model, backbone, batch_of(backbone, prompts[:1]), [2, 4, 30, 31, 2, 5])
    _, again = model.generate(
        conversation, past_key_values=decode_cache(model, backbone, prompts), max_new_tokens=2, pad_token_id=0,
        do_sample=False, eos_token_id=None, return_gates=True,
    )  # fmt: skip
    assert again[0].logit == pytest.approx(model.gates(conversation)[0].logit, abs=1e-5)


def decode_cache(model, backbone, prompts):
    first = batch_of(backbone, prompts[:1])
    return decode(model, first, n=4, eos_token_id=None, return_dict_in_generate=True).past_key_values


def test_one_call_edits_the_last_prompt_token_and_what_follows(backbone, batch):
    model = paved(backbone, Soft())
    out = decode(model, batch, n=4, eos_token_id=None, return_dict_in_generate=True, output_logits=True)
    ids = out.sequences[:, :-1]
    mask = torch.cat([batch.attention_mask, torch.ones(len(batch), 3, dtype=torch.long)], dim=1)
    with torch.no_grad():
        logits = model(ids, mask, prompt_length=batch.width).logits
        base = backbone.model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[:, batch.width - 1 :], torch.stack(out.logits, dim=1), atol=5e-4, rtol=1e-3)
    real = mask[:, : batch.width - 1].bool()
    torch.testing.assert_close(logits[:, : batch.width - 1][real], base[:, : batch.width - 1][real], atol=1e-5, rtol=1e-5)


def test_a_single_call_does_not_go_on_from_a_cache(backbone, batch, prompts):
    model = paved(backbone, Soft())
    with pytest.raises(ValueError, match="use generate"):
        model(batch.input_ids, past_key_values=decode_cache(model, backbone, prompts))


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"generation_config": GenerationConfig(num_beams=3)}, {"assistant_model": object()}],
    ids=["beams", "beams in a configuration", "assisted"],
)
def test_beam_search_and_assisted_decoding_are_refused(backbone, batch, options):
    with pytest.raises(ValueError, match=r"each row has its own gate.*greedy decoding or sampling"):
        paved(backbone, Soft()).generate(batch.input_ids, attention_mask=batch.attention_mask, **options)


def test_beams_that_the_model_itself_asks_for_are_refused(batch):
    model = tiny_model("llama")
    model.generation_config.num_beams = 2
    own = as_backbone(model, tiny_tokenizer(), "tiny")
    with pytest.raises(ValueError, match="each row has its own gate"):
        paved(own, Soft()).generate(batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=2)


def test_right_padding_is_refused_and_left_padding_named(backbone, batch):
    flipped = batch.attention_mask.flip(1)
    with pytest.raises(ValueError, match="padded on the left"):
        paved(backbone, Soft()).generate(batch.input_ids.flip(1), attention_mask=flipped, max_new_tokens=2)


def test_generate_without_prompts_says_what_it_needs(backbone):
    with pytest.raises(ValueError, match="needs input_ids"):
        paved(backbone, Soft()).generate(max_new_tokens=2)


def test_the_policy_can_be_changed_and_keeps_its_threshold(backbone, batch):
    model = paved(backbone, ThresholdedSoft(0.25))
    model.set_policy("hard")
    assert model.controller.policy.threshold == 0.25
    model.set_policy("closed")
    assert torch.equal(decode(model, batch), decode(backbone.model, batch))
    with pytest.raises(ValueError, match="allowed: soft, hard, thresholded, closed, open, oracle"):
        model.set_policy("sometimes")


def test_what_is_not_the_paved_models_own_is_the_models(backbone):
    model = paved(backbone, Soft())
    assert model.config is backbone.model.config
    assert model.device == backbone.device
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


@pytest.mark.parametrize("config", [ROUTED, LATE], ids=["early route", "late route"])
def test_a_saved_paved_model_loads_with_the_same_outputs(tmp_path, batch, config):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.config._name_or_path = "somewhere/tiny"
    before = paved(as_backbone(model, tokenizer, "somewhere/tiny"), ThresholdedSoft(-0.2), config, use_veto=True)
    before.save_pretrained(tmp_path)
    after = paving.load(tiny_model("llama"), tokenizer=tiny_tokenizer(), controller=tmp_path)
    one, gates = decode(before, batch, return_gates=True)
    two, gates_after = decode(after, batch, return_gates=True)
    assert torch.equal(one, two)
    assert gates == gates_after
    assert {f.name for f in tmp_path.iterdir()} == {"controller.safetensors", "controller.json", "README.md"}
    assert "somewhere/tiny" in (tmp_path / "README.md").read_text()


def test_a_loaded_model_needs_its_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="needs its tokenizer too"):
        paving.load(tiny_model("llama"), controller=tmp_path)


def test_a_controller_folder_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"there is no controller folder \./nowhere"):
        paving.load(tiny_model("llama"), tokenizer=tiny_tokenizer(), controller="./nowhere")


def test_a_prompt_of_one_word_can_be_paved(backbone):
    one = batch_of(backbone, [prompt("short", [3], Bucket.EDIT)])
    assert decode(paved(backbone, AlwaysOpen()), one, n=2, eos_token_id=None).shape == (1, one.width + 2)


def test_a_threshold_outlives_a_policy_that_has_none(backbone):
    paved = PavedModel(backbone, lively(backbone, policy=ThresholdedSoft(0.7)))
    assert paved.set_policy("closed").set_policy("hard").controller.policy.threshold == 0.7
    assert (
        paved.set_policy("thresholded", threshold=0.2).set_policy("soft").set_policy("hard").controller.policy.threshold
        == 0.2
    )
