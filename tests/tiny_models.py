"""Random tiny models with a word tokenizer, and controllers whose open gates really change logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from paving.backbone import Backbone, PromptBatch, as_backbone, render_batch
from paving.controller import ControllerConfig, ResidualPaving, fresh_controller
from paving.prompts.types import Bucket, Prompt

VOCABULARY, HIDDEN, LAYERS, WINDOW = 200, 32, 6, 8
CHAT_TEMPLATE = (
    "<bos>{% for m in messages %} <{{ m.role }}> {{ m.content }} <eos>{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # lively enough that an edit changes which token is the most likely
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"head_dim": 8, "sliding_window": WINDOW}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "gemma2": lambda: Gemma2Config(**SIZES, **SLIDING, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, **SLIDING, query_pre_attn_scalar=8),
    "mistral": lambda: MistralConfig(**SIZES),
    "phi3": lambda: Phi3Config(**SIZES),
    "olmo2": lambda: Olmo2Config(**SIZES),
    "gpt2": lambda: GPT2Config(**SIZES),
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3")
ROUTED = ControllerConfig(route_layers=(0, 1), bottleneck_ratio=4, router_hidden=8)
LATE = ControllerConfig(route_layers=(3, 5), edit_layers=(1, 2, 3, 4), bottleneck_ratio=4, router_hidden=8)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>"]
    words = special + [f"w{i}" for i in range(VOCABULARY - len(special))]
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", "<system>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "gemma3-multimodal":
            vision = {
                "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
                "image_size": 32, "patch_size": 16,
            }  # fmt: skip
            text = {**SIZES, **SLIDING, "query_pre_attn_scalar": 8}
            config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
            return Gemma3ForConditionalGeneration(config).to(dtype)
        return AutoModelForCausalLM.from_config(CONFIGS[architecture]()).to(dtype)


def tiny_backbone(architecture: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Backbone:
    return as_backbone(tiny_model(architecture, seed=seed, dtype=dtype), tiny_tokenizer(), f"tiny-{architecture}")


def lively(backbone: Backbone, config: ControllerConfig = ROUTED, *, seed: int = 0, **changes) -> ResidualPaving:
    """A controller with random router, veto and experts: soft gates differ by prompt, open gates change logits."""
    controller = fresh_controller(backbone, config, seed)
    weights = controller.weights
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weights.experts.w_out.copy_(torch.randn(weights.experts.w_out.shape, generator=generator))
        weights.experts.b_in.copy_(torch.randn(weights.experts.b_in.shape, generator=generator))
        weights.router.gate.weight.mul_(8)
        weights.veto.weight.copy_(torch.randn(weights.veto.weight.shape, generator=generator) / 4)
        weights.veto.fitted.fill_(1.0)
    weights.eval().requires_grad_(False)
    return replace(controller, **{"scale": 1.0, "name": "lively", **changes})


def prompt(name: str, words: Sequence[int], bucket: Bucket, target: str | None = None) -> Prompt:
    return Prompt(name, " ".join(f"w{i}" for i in words), bucket, group=name, target=target)


def some_prompts() -> list[Prompt]:
    """Eight prompts of unequal length, the three buckets mixed: 3 to 14 words."""
    buckets = [Bucket.EDIT, Bucket.BENIGN_KEEP, Bucket.HARMFUL_KEEP, Bucket.EDIT]
    generator = torch.Generator().manual_seed(5)
    rows = []
    for i, length in enumerate((9, 3, 14, 6, 11, 4, 7, 12)):
        words = torch.randint(0, 190, (length,), generator=generator).tolist()
        bucket = buckets[i % 4]
        target = " ".join(f"w{10 + (i + j) % 5}" for j in range(6)) if bucket == Bucket.EDIT else None
        rows.append(prompt(f"p{i}", words, bucket, target))
    return rows


def batch_of(backbone: Backbone, prompts: Sequence[Prompt]) -> PromptBatch:
    return render_batch(backbone, prompts)


@torch.no_grad()
def logits_of(backbone: Backbone, batch: PromptBatch) -> torch.Tensor:
    """(n, width, vocab) of one pass over the prompts."""
    return backbone.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    ).logits


def decode(model, batch: PromptBatch, *, n: int = 6, **kwargs):
    kwargs = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 2, **kwargs}
    with torch.no_grad():
        return model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=n, **kwargs)


def hooks_on(model) -> list[str]:
    """Names of modules that carry a forward hook or pre-hook."""
    return [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
