from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, LlamaConfig, T5Config
from transformers import T5ForConditionalGeneration as T5

from paving.backbone import BackboneError, as_backbone, decoder_layers
from tiny_models import CONFIGS, LAYERS, tiny_model, tiny_tokenizer

DEPTH = {"num_hidden_layers": 2}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_blocks_of_every_family_are_found_in_order_of_depth(architecture):
    model = tiny_model(architecture)
    layers = decoder_layers(model)
    assert len(layers) == LAYERS
    decoder = model.get_decoder()
    assert layers is (decoder.h if architecture == "gpt2" else decoder.layers)
    seen = []
    handles = [m.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, m in enumerate(layers)]
    model.eval()(torch.tensor([[1, 7, 8]]))
    for handle in handles:
        handle.remove()
    assert seen == list(range(LAYERS))


def test_a_vision_tower_of_equal_depth_is_not_taken_for_the_decoder():
    model = tiny_model("gemma3-multimodal")
    assert model.config.vision_config.num_hidden_layers == LAYERS
    layers = decoder_layers(model)
    assert {type(m).__name__ for m in layers} == {"Gemma3DecoderLayer"}


def test_another_list_of_equal_length_inside_a_block_is_not_taken_for_the_blocks():
    model = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=16, intermediate_size=16, vocab_size=20, **DEPTH,
                                                         num_attention_heads=2))  # fmt: skip
    model.model.layers[0].heads = nn.ModuleList([nn.Identity(), nn.Identity()])
    assert decoder_layers(model) is model.model.layers


def t5():
    return T5(T5Config(d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8, vocab_size=20))


def bart():
    return BartForConditionalGeneration(
        BartConfig(d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                   decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=20)
    )  # fmt: skip


@pytest.mark.parametrize("make", [t5, bart])
def test_an_encoder_decoder_is_refused_and_the_error_says_what_is_needed(make):
    with pytest.raises(BackboneError, match="decoder-only"):
        as_backbone(make(), tiny_tokenizer(), "seq2seq")


def without_layers(n_layers: int | None, **modules: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, module in modules.items():
        model.add_module(name, module)
    text = SimpleNamespace(**({} if n_layers is None else {"num_hidden_layers": n_layers}))
    model.config = SimpleNamespace(get_text_config=lambda decoder: text, is_encoder_decoder=False)
    return model


def test_a_model_without_blocks_is_refused_and_the_error_lists_what_was_found():
    with pytest.raises(BackboneError, match=r"its 3 decoder layers: found 0 .*heads \(2\)"):
        decoder_layers(without_layers(3, heads=nn.ModuleList([nn.Identity(), nn.Identity()])))


def test_two_lists_of_equal_standing_are_not_guessed_between():
    lists = {name: nn.ModuleList([nn.Identity(), nn.Identity()]) for name in ("left", "right")}
    with pytest.raises(BackboneError, match="found 2 module lists"):
        decoder_layers(without_layers(2, **lists))


def test_a_model_that_does_not_say_how_deep_it_is_is_refused():
    with pytest.raises(BackboneError, match="no num_hidden_layers"):
        decoder_layers(without_layers(None))
