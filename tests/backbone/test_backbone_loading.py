from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from paving.backbone import BackboneError, as_backbone, checked_ids, load_backbone, render_batch, render_messages
from paving.backbone.fingerprint import fingerprint
from paving.prompts.types import Bucket, Role, Turn
from tiny_models import lively, prompt, tiny_backbone, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("llama", seed=3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_one_checkpoint_has_one_fingerprint_in_float32_and_bfloat16(checkpoint):
    full = load_backbone(checkpoint, dtype="float32", device="cpu")
    half = load_backbone(checkpoint, dtype="bfloat16", device="cpu")
    assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert full.fingerprint == half.fingerprint


def test_other_weights_have_another_fingerprint(checkpoint):
    model = load_backbone(checkpoint, device="cpu").model
    before = fingerprint(model)
    model.model.layers[2].mlp.up_proj.weight.data.mul_(1.05)
    assert fingerprint(model) != before
    assert fingerprint(tiny_model("llama", seed=4)) != before


def test_an_edit_of_a_few_columns_or_rows_has_another_fingerprint():
    """Rows of a power of two, as large models have them: samples at multiples of a row's length would all stand in one
    column, and a circuit's edit in another."""
    model = torch.nn.Linear(1024, 512, bias=False)
    model.config = tiny_model("llama").config
    before = fingerprint(model)
    columns = torch.arange(1, 1024)[torch.randperm(1023)[:60]]  # 6 %, as a circuit has
    rows = torch.randperm(512)[:30]
    for index in ((slice(None), columns), (rows, slice(None))):
        changed = copy.deepcopy(model)
        changed.weight.data[index] += 1
        assert fingerprint(changed) != before
    assert fingerprint(copy.deepcopy(model)) == before


def test_a_vector_is_looked_at_in_all_its_length():
    model = torch.nn.LayerNorm(576, bias=False)
    model.config = tiny_model("llama").config
    before = fingerprint(model)
    model.weight.data[300:] += 1
    assert fingerprint(model) != before


def test_a_fingerprint_of_before_says_so():
    controller = replace(lively(tiny_backbone()), base_fingerprint="076ebf6858b17139")
    with pytest.raises(BackboneError, match=r"made by an earlier version of paving: make it again"):
        controller.check(tiny_backbone())


def test_a_loaded_backbone_is_frozen_and_pads_on_the_left(checkpoint):
    backbone = load_backbone(checkpoint, device="cpu")
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not backbone.model.training
    assert backbone.tokenizer.padding_side == "left"


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("./no-such-folder", {}, "there is no model folder ./no-such-folder"),
        ("no-such-org/no-such-model", {}, "cannot load no-such-org/no-such-model"),
        ("./no-such-folder", {"dtype": "int3"}, "allowed: auto, float32, bfloat16, float16"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_named_with_what_would_do(model, options, says):
    with pytest.raises(BackboneError, match=says):
        load_backbone(model, device="cpu", **options)


def test_a_tokenizer_without_a_chat_template_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(BackboneError, match=r"tiny has no chat template.*instruction-tuned"):
        as_backbone(tiny_model("llama"), tokenizer, "tiny")


def test_a_tokenizer_without_padding_pads_with_the_end_of_turn():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    assert as_backbone(tiny_model("llama"), tokenizer, "tiny").pad_id == tokenizer.eos_token_id


def test_a_tokenizer_with_neither_padding_nor_end_of_turn_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(BackboneError, match="neither a padding nor an end-of-text token"):
        as_backbone(tiny_model("llama"), tokenizer, "tiny")


def test_a_layer_out_of_range_is_named_with_the_layers_there_are(backbone):
    with pytest.raises(BackboneError, match=r"route layer 6 does not exist: tiny-llama has layers 0\.\.5"):
        backbone.check_layers((1, 6), "route")
    with pytest.raises(BackboneError, match="edit layer -1"):
        backbone.check_layers((-1,), "edit")


def test_a_prompt_longer_than_the_context_is_refused_by_id(backbone):
    long = prompt("too-long-7", [1] * 300, Bucket.EDIT)
    with pytest.raises(BackboneError, match=r"prompt too-long-7 has 304 tokens.*256-token context"):
        checked_ids(backbone, long)
    fits = prompt("fits", [1] * 240, Bucket.EDIT)
    assert len(checked_ids(backbone, fits, room=12)) == 244
    with pytest.raises(BackboneError, match="prompt fits has 244 tokens; with 13 to follow"):
        render_batch(backbone, [fits], room=13)


def test_a_batch_is_padded_on_the_left_and_positions_begin_at_the_first_real_token(backbone, prompts, batch):
    for row, p in enumerate(prompts):
        ids = checked_ids(backbone, p)
        pad = batch.width - len(ids)
        assert batch.input_ids[row].tolist() == [backbone.pad_id] * pad + ids
        assert batch.attention_mask[row].tolist() == [0] * pad + [1] * len(ids)
        assert batch.position_ids[row, pad:].tolist() == list(range(len(ids)))
    assert batch.ids == tuple(p.id for p in prompts)


def test_a_rendered_conversation_ends_where_the_answer_begins(backbone):
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}, {"role": "user", "content": "w3"}]
    ids = render_messages(backbone, turns)
    tokens = backbone.tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["<bos>", "<user>", "w1", "<eos>", "<assistant>", "w2", "<eos>", "<user>", "w3", "<eos>",
                      "<assistant>"]  # fmt: skip


def test_every_end_of_turn_token_ends_an_answer():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [9, 11]
    assert as_backbone(model, tiny_tokenizer(), "tiny").eos_ids == (2, 9, 11)


def test_the_text_decoder_of_a_multimodal_model_is_the_backbone(prompts):
    backbone = tiny_backbone("gemma3-multimodal")
    assert (backbone.n_layers, backbone.d_model, backbone.context_length) == (6, 32, 256)


def test_a_prompt_is_asked_behind_its_system_prompt():
    backbone = tiny_backbone()
    asked = prompt("p", [10, 11], Bucket.EDIT)
    plain, behind = checked_ids(backbone, asked), checked_ids(backbone, replace(asked, system="w50 w51"))
    words = backbone.tokenizer.decode(behind)
    assert words.index("<system> w50 w51") < words.index("<user>") and behind[-len(plain) + 1 :] == plain[1:]


def test_a_template_without_system_prompts_says_so():
    backbone = tiny_backbone()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system here') if messages[0].role == 'system' else '<bos> w1' }}"
    without = as_backbone(backbone.model, tokenizer, "plain")
    asked = prompt("p", [10, 11], Bucket.EDIT)
    assert checked_ids(without, asked)
    with pytest.raises(BackboneError, match=r"chat template of plain takes no system prompt \(no system here\)"):
        checked_ids(without, replace(asked, system="w50"))


def test_a_conversation_is_rendered_whole_behind_its_system_prompt(backbone):
    talk = replace(
        prompt("p", [10, 11], Bucket.EDIT), system="w50", history=(Turn(Role.USER, "w1"), Turn(Role.ASSISTANT, "w2"))
    )
    words = backbone.tokenizer.decode(checked_ids(backbone, talk))
    alone = backbone.tokenizer.decode(checked_ids(backbone, replace(talk, system=None, history=())))
    parts = ["<system> w50", "<user> w1", "<assistant> w2", alone.removeprefix("<bos>").strip()]
    assert [words.index(part) for part in parts] == sorted(words.index(part) for part in parts)
    assert words.endswith(parts[-1])
