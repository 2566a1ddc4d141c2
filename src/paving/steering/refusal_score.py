"""How likely a refusal is to begin: log-odds of the first tokens of the base's own refusals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paving.backbone import Backbone, checked_ids, render_batch
from paving.backbone.weights import float64
from paving.generation import batches_by_length
from paving.prompts.types import Bucket, Prompt, SplitName
from paving.steering.checks import SteeringError
from paving.steering.material import Material
from paving.steering.steered import Editor
from paving.traces.forward import next_token_logits

EPSILON = 1e-8  # the published code's: scores end at ± 18.4


@dataclass(frozen=True)
class RefusalTokens:
    """Token ids that refusals begin with, most frequent first; `share` of n_refusals refusals begin with one of them."""

    ids: tuple[int, ...]
    share: float
    n_refusals: int


def refusal_tokens(material: Material, share: float = 0.9) -> RefusalTokens:
    """The fewest first tokens that make up `share` of the base's own refusals of the training split's edit prompts.

    A token that begins a greater part of the base's answers to benign keeps than of its refusals tells nothing of a refusal
    and is left out, so a smaller share may be all there is; the result says which. The published code names tokens per
    model family instead ("I", "As").

    raises SteeringError where no such token is left
    """

    def firsts(bucket: Bucket) -> Counter[int]:
        answers = (material.answers.get(p.id) for p in material.of(SplitName.TRAIN, bucket))
        return Counter(answer[0] for answer in answers if answer)

    refusals, benign = firsts(Bucket.EDIT), firsts(Bucket.BENIGN_KEEP)
    n, n_benign = refusals.total(), max(benign.total(), 1)
    chosen: list[int] = []
    covered = 0
    for token, count in sorted(refusals.items(), key=lambda item: (-item[1], item[0])):
        if covered >= share * n:
            break
        if count / n > benign[token] / n_benign:
            chosen.append(token)
            covered += count
    if not chosen:
        raise SteeringError(
            f"the base's {n} refusals of training edit prompts begin with no token that its {benign.total()} answers to "
            "benign keeps do not begin with as often, so there is no refusal score. Give Material.answers of prompts that "
            "the base refuses."
        )
    return RefusalTokens(tuple(chosen), covered / n, n)


def refusal_scores(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """(n,) float64: log p − log(1 − p), p = the probability of any of the tokens (arXiv 2406.11717). logits: (n, vocab)"""
    p = float64(logits).softmax(-1)[:, list(tokens)].sum(-1)
    return (p + EPSILON).log() - (1 - p + EPSILON).log()


@torch.no_grad()
def prompt_scores(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    tokens: RefusalTokens,
    editor: Editor | None = None,
    *,
    batch_size: int = 16,
) -> dict[str, float]:
    """Prompt id -> log-odds that its answer begins as the base's refusals do, with `editor` at strength 1 if given."""
    found: dict[str, float] = {}
    rows = {p.id: checked_ids(backbone, p) for p in prompts}
    for chunk in batches_by_length(prompts, rows, batch_size):
        batch = render_batch(backbone, chunk)
        if editor is None:
            logits = next_token_logits(backbone, batch)
        else:
            with editor.editing(backbone, batch, torch.ones(len(batch))):
                logits = next_token_logits(backbone, batch)
        scores = refusal_scores(logits, tokens.ids).tolist()
        found |= {p.id: score for p, score in zip(chunk, scores, strict=True)}
    return found
