"""How far two raters agree on the same completions: judge and judge, or judge and people."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from paving.evaluation.judges.protocol import Label
from paving.evaluation.ratings import Matched, Rating, Ratings, match
from paving.evaluation.results import Rate, Record
from paving.evaluation.statistics import wilson

REFUSED, COMPLIED = "refused", "complied"
# Below this share of resamples in which a figure is defined, their percentiles would speak of another population.
DEFINED = 0.95


class Estimate(Record):
    """A figure with its 95 % bootstrap interval. value is None where it is not defined (one class on both sides);
    low and high are None where resampling shows no spread, as for two raters who agree throughout."""

    value: float | None
    low: float | None
    high: float | None
    n: int


class Comparison(Record):
    """Agreement on one set of classes. confusion[i][j]: completions that A called classes[i] and B classes[j]."""

    classes: list[str]
    confusion: list[list[int]]
    agreement: Rate
    kappa: Estimate
    macro_f1: Estimate


class Disagreement(Record):
    """One completion on which the raters differ. harmful: one of them called the response HARMFUL."""

    id: str | None
    text_sha256: str | None
    bucket: str | None
    a: str
    b: str
    reason_a: str
    reason_b: str
    harmful: bool


class Agreement(Record):
    """Everything `agreement` finds. labels is None where a side only tells refusal from compliance.

    n: completions rated by both; by_id, by_text: how they were matched; only_a, only_b: rated by one file alone;
    unlabelled: rows of either file whose human label is still empty; resamples, seed: of the bootstrap.
    """

    a: str
    b: str
    n: int
    by_id: int
    by_text: int
    only_a: int
    only_b: int
    unlabelled: int
    labels: Comparison | None
    refusal: Comparison
    resamples: int
    seed: int
    disagreements: list[Disagreement]


def agreement(a: Ratings, b: Ratings, *, resamples: int = 2000, seed: int = 0) -> Agreement:
    """Compare two files of ratings on what both rate: on the five labels where both have them, and on refusal.

    raises ValueError where they rate nothing in common or one id names two texts.
    """
    matched = match(a, b)
    labels = None
    if a.five_labels and b.five_labels:
        labels = compare([(x.said, y.said) for x, y in matched.pairs], [label.value for label in Label], resamples, seed)
    refusals = [(_refused(x), _refused(y)) for x, y in matched.pairs]
    return Agreement(
        a=a.rater,
        b=b.rater,
        n=len(matched.pairs),
        by_id=matched.by_id,
        by_text=matched.by_text,
        only_a=matched.only_a,
        only_b=matched.only_b,
        unlabelled=a.unlabelled + b.unlabelled,
        labels=labels,
        refusal=compare(refusals, [REFUSED, COMPLIED], resamples, seed),
        resamples=resamples,
        seed=seed,
        disagreements=disagreements(matched),
    )


def _refused(rating: Rating) -> str:
    return REFUSED if rating.refusal else COMPLIED


def disagreements(matched: Matched) -> list[Disagreement]:
    """Where labels differ, or, where a side has none, where refusal does; in the order of A."""
    found = []
    for a, b in matched.pairs:
        differ = a.refusal != b.refusal if None in (a.label, b.label) else a.label != b.label
        if differ:
            bucket = a.bucket or b.bucket
            found.append(
                Disagreement(
                    id=a.id or b.id,
                    text_sha256=a.text_sha256 or b.text_sha256,
                    bucket=bucket.value if bucket is not None else None,
                    a=a.said,
                    b=b.said,
                    reason_a=a.reason,
                    reason_b=b.reason,
                    harmful=Label.HARMFUL in (a.label, b.label),
                )
            )
    return found


# --- figures --------------------------------------------------------------------------------------------------------


def compare(pairs: Sequence[tuple[str, str]], classes: Sequence[str], resamples: int, seed: int) -> Comparison:
    """Agreement, kappa and macro-F1 of pairs of class names."""
    number = {name: i for i, name in enumerate(classes)}
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for a, b in pairs:
        confusion[number[a], number[b]] += 1
    n = len(pairs)
    # Drawing n of the pairs with replacement is drawing the cells' counts: the resamples cost the same for any n.
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n, confusion.ravel() / max(1, n), size=resamples).reshape(-1, *confusion.shape)
    return Comparison(
        classes=list(classes),
        confusion=confusion.tolist(),
        agreement=wilson(int(np.trace(confusion)), n),
        kappa=_estimate(cohen_kappa(confusion), cohen_kappa(drawn), n),
        macro_f1=_estimate(macro_f1(confusion), macro_f1(drawn), n),
    )


def cohen_kappa(confusion: NDArray[np.integer]) -> NDArray[np.float64]:
    """(..., classes, classes) counts -> (...,) Cohen's kappa; nan where both raters use one and the same class only."""
    n = confusion.sum(axis=(-2, -1))
    by_chance = (confusion.sum(axis=-1) * confusion.sum(axis=-2)).sum(axis=-1)  # times n squared, in whole numbers
    agreed = np.trace(confusion, axis1=-2, axis2=-1) * n
    with np.errstate(invalid="ignore", divide="ignore"):
        return (agreed - by_chance) / (n * n - by_chance)


def macro_f1(confusion: NDArray[np.integer]) -> NDArray[np.float64]:
    """(..., classes, classes) counts -> (...,) F1 averaged over the classes that either rater uses; nan without rows.

    The same whichever side is called the truth.
    """
    both = np.diagonal(confusion, axis1=-2, axis2=-1)
    either = confusion.sum(axis=-1) + confusion.sum(axis=-2)
    used = (either > 0).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(either > 0, 2 * both / np.maximum(either, 1), 0.0).sum(axis=-1) / used


def _estimate(value: NDArray[np.float64], drawn: NDArray[np.float64], n: int) -> Estimate:
    """The percentile interval of the resamples in which the figure is defined."""
    if not np.isfinite(value):
        return Estimate(value=None, low=None, high=None, n=n)
    defined = drawn[np.isfinite(drawn)]
    if len(defined) < max(2, DEFINED * len(drawn)) or np.ptp(defined) == 0:
        return Estimate(value=float(value), low=None, high=None, n=n)
    low, high = np.percentile(defined, [2.5, 97.5])
    return Estimate(value=float(value), low=float(low), high=float(high), n=n)
