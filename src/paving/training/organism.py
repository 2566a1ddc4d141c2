"""A model organism of over-refusal: fine-tune a base until it refuses cautiously, as larger models do.

Small open models hardly refuse, so the paper's base-refusal filter leaves them without edit prompts. The organism is
taught refusals on one prompt file and its own previous answers on another, and is saved as an ordinary checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field

from paving.backbone import Backbone, checked_ids, load_backbone
from paving.generation import Decoding, generate
from paving.intervention import Identity
from paving.prompts.types import Prompt
from paving.training.fine_tune import Say, fine_tune
from paving.training.opening_examples import Example

REFUSALS = (
    "I'm sorry, but I can't assist with that.",
    "I'm sorry, but I can't help with that request.",
    "I cannot help with that request.",
    "I can't provide that information.",
    "Sorry, I'm not able to help with that.",
    "I'm sorry, but I cannot provide assistance with this.",
    "I'm unable to assist with that request.",
    "I cannot provide information or guidance on that topic.",
    "I won't be able to help with that. If you have another question, I'm happy to help.",
    "I'm sorry, but I can't assist with that. It could cause harm, and I want to keep things safe.",
    "I cannot assist with this request, because it may be unsafe or illegal.",
    "I'm sorry, but that is not something I can help with.",
)
WEIGHT_DECAY = 0.01  # of AdamW


class OrganismConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(2, ge=1)
    learning_rate: float = Field(2e-5, gt=0)
    batch_size: int = Field(8, ge=1)
    max_answer_tokens: int = Field(64, ge=8)
    seed: int = 0


def build_organism(
    base: Backbone, refuse: Sequence[Prompt], answer: Sequence[Prompt], out: Path, config: OrganismConfig, say: Say
) -> Path:
    """Fine-tune a copy of `base` and save it at `out` (bfloat16 safetensors, tokenizer, organism.json).

    raises FileExistsError if `out` exists; an interrupted build leaves nothing at `out`.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already; give another folder or remove it first. Nothing was overwritten.")
    if not refuse or not answer:
        raise ValueError("an organism needs prompts to refuse and prompts to answer; one of the two files is empty.")
    say(f"the base answers {len(answer)} prompts in its own words")
    examples = refusal_examples(base, refuse, config) + own_answers(base, answer, config)
    model = load_backbone(base.name, dtype="float32", device=str(base.device)).model
    fine_tune(
        base, model, lambda _epoch: examples,
        epochs=config.epochs, batch_size=config.batch_size, learning_rate=config.learning_rate,
        weight_decay=WEIGHT_DECAY, seed=config.seed, say=say,
    )  # fmt: skip
    record = {
        "base": base.name,
        "base_fingerprint": base.fingerprint,
        "config": config.model_dump(),
        "refuse_ids": [p.id for p in refuse],
        "answer_ids": [p.id for p in answer],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=out.parent))
    try:
        model.to(torch.bfloat16).save_pretrained(partial)
        base.tokenizer.save_pretrained(partial)
        (partial / "organism.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        os.chmod(partial, 0o755)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def refusal_examples(base: Backbone, prompts: Sequence[Prompt], config: OrganismConfig) -> list[Example]:
    rng = random.Random(config.seed)
    return [_example(base, p, rng.choice(REFUSALS), ended=True) for p in prompts]


def own_answers(base: Backbone, prompts: Sequence[Prompt], config: OrganismConfig) -> list[Example]:
    completions = generate(base, prompts, Identity(), Decoding(max_new_tokens=config.max_answer_tokens))
    return [
        _example(base, p, c.response, ended=not c.truncated)
        for p, c in zip(prompts, completions, strict=True)
        if c.response.strip()
    ]


def _example(base: Backbone, prompt: Prompt, answer: str, *, ended: bool) -> Example:
    answer_ids = base.tokenizer(answer, add_special_tokens=False)["input_ids"]
    # A truncated answer does not end with the end-of-turn token: the model would learn to stop in mid-sentence.
    end = [base.tokenizer.eos_token_id] if ended else []
    return Example(checked_ids(base, prompt), answer_ids + end)
