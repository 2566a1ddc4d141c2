"""What a circuit run reads: pairs, opening phrases, prompts for generation, and the base's own benign answers."""

from __future__ import annotations

from collections.abc import Sequence

from paving.backbone import Backbone, render_ids
from paving.circuit.pairs import Pair, read_pairs, split_pairs
from paving.circuit_run.config import CircuitConfig
from paving.generation import Decoding, generate
from paving.intervention import Identity
from paving.prompts.types import Bucket, Prompt
from paving.run import Means
from paving.training.opening_examples import Example
from paving.training.openings import Openings, openings, read_openings


def pairs_of(config: CircuitConfig) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """(train, calibration). raises CircuitError for a category without pairs, or too few."""
    pairs = read_pairs(config.pairs, config.category, benign=config.benign, limit=config.limit)
    return split_pairs(pairs, config.calibration, config.seed)


def openings_of(config: CircuitConfig) -> Openings:
    return openings() if config.openings is None else read_openings(config.openings)


def harmful_prompts(pairs: Sequence[Pair]) -> list[Prompt]:
    return [Prompt(f"{p.id}/harmful", p.harmful, Bucket.HARMFUL_KEEP, group=p.id) for p in pairs]


def benign_prompts(pairs: Sequence[Pair]) -> list[Prompt]:
    return [Prompt(f"{p.id}/benign", p.benign, Bucket.BENIGN_KEEP, group=p.id) for p in pairs]


def own_answers(backbone: Backbone, config: CircuitConfig, train: Sequence[Pair], means: Means) -> tuple[Example, ...]:
    """What the base answers to the benign side, for the retain term."""
    prompts = list({p.text: p for p in benign_prompts(train)}.values())
    tick = means.stage("the base's own benign answers", len(prompts))
    answers = generate(backbone, prompts, Identity(), Decoding(max_new_tokens=config.own_tokens), tick=tick)
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = backbone.tokenizer(answer.response, add_special_tokens=False)["input_ids"]
        if tokens:
            rows.append(Example(render_ids(backbone, prompt.text), tokens))
    return tuple(rows)
