"""Two rows of a table on the same prompts: whose refusals changed, by how much, and could that be chance?

Rates of two rows are not independent, because both answered the same prompts, so their two Wilson intervals say little
about the difference. Only prompts on which the rows disagree carry information about it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

from scipy import optimize, stats

from paving.evaluation.results import PairedRates
from paving.prompts.types import Bucket

EPSILON = 1e-9  # how far from the observed difference the search for a limit begins; far below what any n can tell apart
K = TypeVar("K", bound=Hashable)  # a prompt id; or, over several runs, a run and an id
NAMED = 5  # how many ids an error names before it only counts


def paired_rates(row: Mapping[K, bool], reference: Mapping[K, bool], confidence: float = 0.95) -> PairedRates:
    """A yes-or-no verdict of two rows, compared prompt by prompt.

    row, reference: prompt id -> refused (or any other verdict, such as broken); the same ids in both
    raises ValueError where an id is in one of them only: a pair with one half missing is no pair
    """
    require_same_ids(row, reference)
    only_row = sum(row[i] and not reference[i] for i in row)
    only_reference = sum(reference[i] and not row[i] for i in row)
    return from_counts(only_row, only_reference, len(row), confidence)


def paired_by_bucket(
    row: Mapping[str, bool], reference: Mapping[str, bool], buckets: Mapping[str, str]
) -> dict[str, PairedRates]:
    """The same comparison for every bucket, also for one without prompts.

    buckets: prompt id -> bucket value, for all ids of row and reference
    """
    require_same_ids(row, reference)
    require_known(row, buckets, "bucket")
    chosen = {b.value: [i for i in row if buckets[i] == b] for b in Bucket}
    return {b: paired_rates({i: row[i] for i in ids}, {i: reference[i] for i in ids}) for b, ids in chosen.items()}


def from_counts(only_row: int, only_reference: int, n: int, confidence: float = 0.95) -> PairedRates:
    """The comparison from its counts. raises ValueError unless the two counts are >= 0 and fit into n pairs."""
    if min(only_row, only_reference) < 0 or only_row + only_reference > n:
        raise ValueError(f"{only_row} + {only_reference} discordant pairs do not fit into n={n} pairs.")
    if n == 0:
        return PairedRates(n=0, only_row=0, only_reference=0, difference=None, low=None, high=None, p=None)
    low, high = score_interval(only_row, only_reference, n, confidence)
    return PairedRates(
        n=n,
        only_row=only_row,
        only_reference=only_reference,
        difference=(only_row - only_reference) / n,
        low=low,
        high=high,
        p=exact_p(only_row, only_reference),
    )


def exact_p(only_row: int, only_reference: int) -> float:
    """McNemar's exact two-sided p: given how many pairs disagree, each side was equally likely (binomial, 1/2)."""
    disagreeing = only_row + only_reference
    return float(stats.binomtest(only_row, disagreeing).pvalue) if disagreeing else 1.0


def score_interval(only_row: float, only_reference: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Limits of the difference of two paired rates, n > 0: all differences that the score test does not reject.

    The counts need not be whole, as effective numbers of pairs are not (`resampling.effective_n`).

    T. Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample design,
    Statistics in Medicine 17 (1998) 891-908.
    """
    z2 = float(stats.norm.ppf((1 + confidence) / 2)) ** 2
    observed = (only_row - only_reference) / n

    def rejected_by(delta: float) -> float:
        """Squared distance to the observed count, minus what z standard errors under this difference allow."""
        a = 2 * n
        b = (2 * n - only_row + only_reference) * delta - only_row - only_reference
        c = -only_reference * delta * (1 - delta)
        # The likeliest share of pairs that only the reference refused, if the true difference were delta.
        share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        return (only_row - only_reference - n * delta) ** 2 - z2 * n * (2 * share + delta * (1 - delta))

    # The search begins beside the observed difference, not on it: without discordant pairs the variance is 0 there,
    # the function touches 0, and the root found would be a zero-width interval.
    below, above = observed - EPSILON, observed + EPSILON
    low = -1.0 if below <= -1 else float(optimize.brentq(rejected_by, -1.0, below))
    high = 1.0 if above >= 1 else float(optimize.brentq(rejected_by, above, 1.0))
    return low, high


def require_same_ids(row: Iterable[K], reference: Iterable[K]) -> None:
    """raises ValueError that names ids which only one of two rows has."""
    unpaired = sorted(set(row) ^ set(reference), key=str)
    if unpaired:
        raise ValueError(
            f"{len(unpaired)} prompts have a value in one of the two rows only: {_named(unpaired)}. "
            f"Rows are compared on the same prompts: evaluate both on one split, or leave these out of both."
        )


def require_known(ids: Iterable[K], known: Mapping[K, object], what: str) -> None:
    """raises ValueError that names ids without an entry in `known`; `what` says what the entry would be."""
    missing = sorted((i for i in ids if i not in known), key=str)
    if missing:
        raise ValueError(f"{len(missing)} prompts have no {what}: {_named(missing)}. Give one for every prompt compared.")


def _named(ids: list) -> str:
    more = [f"and {len(ids) - NAMED} more"] if len(ids) > NAMED else []
    return ", ".join([*map(str, ids[:NAMED]), *more])
