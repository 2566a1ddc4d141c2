"""How near a row's answers to benign keeps are to the base's own (Residual Paving, tables 10 to 12), and those to edit
prompts to their targets."""

from __future__ import annotations

from collections.abc import Sequence

from paving.evaluation.comparison import BenignSimilarity, TargetSimilarity, is_success
from paving.evaluation.diagnostics.usefulness import bert_score, overlap, overlap_available
from paving.evaluation.judges import Label
from paving.evaluation.statistics import wilson


def benign_similarity(
    answers: Sequence[str],
    base: Sequence[str],
    labels: Sequence[Label],
    base_labels: Sequence[Label],
    *,
    bert_model: str | None = None,
) -> BenignSimilarity:
    """answers, base, labels, base_labels: of the same benign keeps, in the same order.

    raises MetricError as `bert_score` does
    """
    n = len(answers)
    pairs = list(zip(labels, base_labels, strict=True))
    differing = [(a, b) for a, b in zip(answers, base, strict=True) if a != b]
    changed, original = [a for a, _ in differing], [b for _, b in differing]
    rouge_l = chrf = bert = None
    if n and overlap_available():
        found = overlap(changed, original)
        rouge_l = _with_same(found.rouge_l, len(differing), n, 1.0)
        chrf = _with_same(found.chrf, len(differing), n, 100.0)
    if n and bert_model is not None:
        bert = _with_same(bert_score(changed, original, model=bert_model), len(differing), n, 1.0)
    return BenignSimilarity(
        label_agreement=wilson(sum(a == b for a, b in pairs), n),
        non_worse=wilson(sum(is_success(a) or not is_success(b) for a, b in pairs), n),
        rouge_l=rouge_l,
        chrf=chrf,
        bert_score=bert,
    )


def target_similarity(answers: Sequence[str], targets: Sequence[str]) -> TargetSimilarity:
    """answers: of edit prompts that have a target, cut to its length; targets in the same order."""
    if not answers or not overlap_available():
        return TargetSimilarity(n=len(answers), rouge_l=None, chrf=None)
    found = overlap(answers, targets)
    return TargetSimilarity(n=len(answers), rouge_l=found.rouge_l, chrf=found.chrf)


def _with_same(mean: float | None, n_differing: int, n: int, same: float) -> float:
    """The mean over all n answers, of which those that do not differ score `same`: ROUGE finds no word in some of them."""
    return ((mean or 0.0) * n_differing + same * (n - n_differing)) / n
