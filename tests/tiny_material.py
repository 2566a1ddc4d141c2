"""Prompts, answers and edit targets for fitting comparators on a tiny model. Words mean nothing."""

from __future__ import annotations

from paving.backbone import Backbone
from paving.prompts.types import Bucket, Prompt, Splits
from paving.steering.material import Material
from tiny_models import prompt

REFUSAL_FIRST = (103, 104)  # first tokens of the refusals below
WORDS = {Bucket.EDIT: 20, Bucket.BENIGN_KEEP: 60, Bucket.HARMFUL_KEEP: 120}


def _prompts(split: str, n: int) -> tuple[Prompt, ...]:
    """n of each bucket, of 4 to 8 words. Harmful keeps share words with one another, and benign keeps do."""
    start = {"train": 0, "calibration": 10}[split]
    return tuple(
        prompt(f"{split}-{bucket.value}-{i}", [word + start + (i * j) % 9 for j in range(4 + i % 5)], bucket)
        for bucket, word in WORDS.items()
        for i in range(n)
    )


def tiny_material(backbone: Backbone, n: int = 7) -> Material:
    """Refusals begin with token 103, every third with 104; the answers end with the end of turn."""
    splits = Splits(_prompts("train", n), _prompts("calibration", n), ())
    end = backbone.eos_ids[0]
    prompts = splits.train + splits.calibration
    edits = [p for p in prompts if p.bucket is Bucket.EDIT]
    targets = {p.id: (150 + i % 4, 151, *range(160, 160 + i % 5), end) for i, p in enumerate(edits)}
    answers = {p.id: (REFUSAL_FIRST[i % 3 == 2], 30, 31, *range(40, 40 + i % 3), end) for i, p in enumerate(edits)}
    answers |= {p.id: (80 + i % 6, 90, end) for i, p in enumerate(prompts) if p.bucket is Bucket.BENIGN_KEEP}
    return Material(splits, targets, answers)
