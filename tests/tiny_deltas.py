"""Deltas with random values on tiny random models, and those models as checkpoint folders."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from paving.backbone import Backbone, as_backbone, load_backbone
from paving.backbone.projections import ffn_outputs
from paving.circuit.delta import Delta, make_delta
from paving.circuit.mask import Mask, choose
from paving.circuit.slices import SliceDelta, slice_of
from tiny_models import VOCABULARY, tiny_backbone, tiny_tokenizer

RATE = {"k": 3, "n": 40, "rate": 0.075, "low": 0.026, "high": 0.199}


def gpt2_backbone(dtype: torch.dtype = torch.float32) -> Backbone:
    """Its FFN output projections are Conv1D: stored transposed."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_inner=48, n_layer=6, n_head=4, n_positions=256,
        initializer_range=0.15, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return as_backbone(GPT2LMHeadModel(config).to(dtype), tiny_tokenizer(), "tiny-gpt2")


def saved(backbone: Backbone, folder: Path, **how) -> Path:
    """`backbone` as a checkpoint folder; `how` goes to save_pretrained."""
    backbone.model.save_pretrained(folder, **how)
    backbone.tokenizer.save_pretrained(folder)
    return folder


def saved_llama(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **how) -> Backbone:
    """A tiny Llama that was saved and loaded again, so that its name is its folder."""
    return load_backbone(saved(tiny_backbone(seed=seed, dtype=dtype), folder, **how))


def tiny_delta(
    backbone: Backbone,
    category: str = "crime",
    *,
    seed: int = 0,
    reading: str = "neurons",
    alpha: float = 1.7,
    fraction: float = 0.2,
    mask: Mask | None = None,
    **about,
) -> Delta:
    """Random channels of every layer but the first, random values large enough to change answers."""
    projections = ffn_outputs(backbone)
    axis = 1 if reading == "neurons" else 0
    generator = torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(p.weight.shape[axis], generator=generator) for n, p in projections.items() if n}
    mask = mask or choose(scores, reading, fraction)
    values = {}
    for layer in mask.channels:
        own = slice_of(projections[layer].weight, mask, layer)
        values[layer] = (torch.randn(own.shape, generator=generator) / 4).to(own.dtype)
    return make_delta(backbone, SliceDelta(mask, values), category=category, alpha=alpha, scores=scores, **about)
