"""Every architecture that is served answers as it does in transformers, with open and closed gates beside each other."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these in an environment of its own")

import torch
from asked_engine import served, tokens
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from paving.backbone import as_backbone
from paving.controller import ControllerConfig, Hard, PavedModel, save_controller
from tiny_models import SIZES, lively, tiny_tokenizer

# Heads of 32, the smallest that vLLM's attention on CPU takes; no end token, so that all answers are of one length.
WIDE = SIZES | {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": None}
ROUTED = ControllerConfig(route_layers=(0, 1), edit_layers=(2, 3, 4, 5), bottleneck_ratio=4, router_hidden=8)
LATE = ControllerConfig(route_layers=(2, 4), edit_layers=(1, 2, 3, 4, 5), bottleneck_ratio=4, router_hidden=8)
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**WIDE),
    "qwen3": lambda: Qwen3Config(**WIDE, head_dim=32),
    "mistral": lambda: MistralConfig(**WIDE),
    "phi3": lambda: Phi3Config(**WIDE),
    "gemma2": lambda: Gemma2Config(**WIDE, head_dim=32, query_pre_attn_scalar=32, sliding_window=16),
    "gemma3": lambda: Gemma3TextConfig(**WIDE, head_dim=32, query_pre_attn_scalar=32, sliding_window=16),
}
PROMPTS = [[5 + (7 * i + j * j) % 190 for j in range(4 + 5 * i)] for i in range(6)]
TOKENS = 12


@pytest.mark.parametrize("architecture", CONFIGS)
def test_open_and_closed_rows_are_as_in_transformers(architecture, tmp_path):
    check(architecture, tmp_path)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma2"])
def test_on_two_ranks_each_applies_the_same_edit(architecture, tmp_path):
    check(architecture, tmp_path, tensor_parallel_size=2)


def check(architecture: str, tmp_path: Path, **options: object) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[architecture]())
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    backbone = as_backbone(model.eval(), tiny_tokenizer(), str(tmp_path / "base"))
    controller = lively(backbone, LATE if architecture == "qwen3" else ROUTED).with_policy(Hard(-1e9))
    folder = save_controller(controller, tmp_path / "controller")
    policies = ["closed" if i % 2 else None for i in range(len(PROMPTS))]
    base = {"model": tmp_path / "base", "max_tokens": TOKENS}
    (found,), _ = served(tmp_path, folder, [(PROMPTS, policies)], **base, **options)
    by = {policy: answers(PavedModel(backbone, controller), policy) for policy in ("closed", None)}
    assert tokens(found) == [by[policy][i] for i, policy in enumerate(policies)]
    assert sum(a != b for a, b in zip(by[None][::2], by["closed"][::2], strict=True)) >= 2


def answers(model: PavedModel, policy: str | None) -> list[list[int]]:
    if policy is not None:
        model.set_policy(policy)
    found = []
    for ids in PROMPTS:
        out = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)
        found.append(out[0, len(ids) :].tolist())
    return found
