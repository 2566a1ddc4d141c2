"""Intervals that know which prompts belong together: draw whole groups again and again, and see how the figure moves.

Prompts of one group (a focus word, a template, near duplicates) are answered alike, so that ten of them tell less than
ten of different groups. Whole groups are therefore drawn, with replacement, never single prompts out of them.

A preservation score takes its limits from the redrawn scores. A rate takes only its standard error from them and its
limits from a score interval: redrawing 1 refusal in 100 puts the upper limit near 3, and 0 in 100 puts it at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from scipy import stats

from paving.evaluation.paired import paired_rates, require_known, require_same_ids, score_interval
from paving.evaluation.results import OracleGapIntervals, PairedRates, Rate, Resampled
from paving.evaluation.statistics import wilson
from paving.prompts.types import Bucket

RESAMPLES = 5000  # limits then move by about 3 % of the width between seeds
CONFIDENCE = 0.95
CHUNK = 2_000_000  # drawn groups held at once, so that thousands of prompts need no gigabytes

K = TypeVar("K", bound=Hashable)  # a prompt id; or, over several seeds, a seed and an id
Statistic = Callable[[np.ndarray], np.ndarray]  # means (..., columns) -> figure (...)


def preservation_interval(divergence: Mapping[str, float], groups: Mapping[str, str], *, seed: int = 0) -> Resampled:
    """exp(-mean KL) of one row.

    divergence: prompt id -> mean KL to the base along its continuation (nats), of one bucket
    groups:     prompt id -> group, for at least these ids
    """
    return by_group([divergence], groups, score, seed=seed)


def preservation_difference(
    row: Mapping[str, float], reference: Mapping[str, float], groups: Mapping[str, str], *, seed: int = 0
) -> Resampled:
    """exp(-mean KL) of a row minus the reference row's, on the same prompts; arguments as above."""
    return by_group([row, reference], groups, score_difference, seed=seed)


def rate_interval(flags: Mapping[K, bool], groups: Mapping[K, str], *, seed: int = 0) -> Resampled:
    """Share of yes (refused), with Wilson's interval for as many independent answers as these are worth.

    flags: prompt id -> yes or no, of one bucket; groups: prompt id -> group, for at least these ids
    """
    found = by_group([flags], groups, mean, seed=seed)
    if found.value is None or found.groups == 1:
        return found
    n = effective_n(found, found.value * (1 - found.value) / found.n)
    low, high = _wilson_limits(found.value, n)
    return found.model_copy(update={"low": low, "high": high})


def rate_difference(
    row: Mapping[K, bool], reference: Mapping[K, bool], groups: Mapping[K, str], *, seed: int = 0
) -> Resampled:
    """Share of yes in a row minus the reference row's, on the same prompts, with Tango's interval for as many
    independent pairs as these are worth. Where no prompt shares a group, it is that of `paired_rates`."""
    found = by_group([row, reference], groups, mean_difference, seed=seed)
    if found.value is None or found.groups == 1:
        return found
    plain = paired_rates(row, reference)
    disagreeing = (plain.only_row + plain.only_reference) / found.n
    share = effective_n(found, (disagreeing - found.value**2) / found.n) / found.n
    low, high = score_interval(plain.only_row * share, plain.only_reference * share, found.n * share, CONFIDENCE)
    return found.model_copy(update={"low": low, "high": high})


def grouped_rate(flags: Mapping[K, bool], groups: Mapping[K, str]) -> Rate:
    """The rate of a table: Wilson's interval, for as many independent answers as these are worth where prompts share groups.
    Of one group it is that of a single answer."""
    plain = wilson(sum(map(bool, flags.values())), len(flags))
    if not _share_groups(flags, groups):
        return plain
    found = rate_interval(flags, groups)
    low, high = _wilson_limits(plain.rate, 1) if found.groups == 1 else (found.low, found.high)
    return plain.model_copy(update={"low": low, "high": high})


def grouped_pair(row: Mapping[K, bool], reference: Mapping[K, bool], groups: Mapping[K, str]) -> PairedRates:
    """`paired_rates` with Tango's interval for as many independent pairs as these are worth. p is McNemar's, by prompt."""
    plain = paired_rates(row, reference)
    if not _share_groups(row, groups):
        return plain
    found = rate_difference(row, reference, groups)
    low, high = found.low, found.high
    if found.groups == 1:
        low, high = score_interval(plain.only_row / plain.n, plain.only_reference / plain.n, 1, CONFIDENCE)
    return plain.model_copy(update={"low": low, "high": high})


def _share_groups(ids: Iterable[K], groups: Mapping[K, str]) -> bool:
    known = list(ids)
    require_known(known, groups, "group")
    return len({groups[i] for i in known}) < len(known)


def oracle_gap_intervals(
    divergence: tuple[Mapping[str, float], Mapping[str, float]],
    refused: tuple[Mapping[str, bool], Mapping[str, bool]],
    buckets: Mapping[str, str],
    groups: Mapping[str, str],
    *,
    seed: int = 0,
) -> OracleGapIntervals:
    """Keeps and edits lost to routing, each bucket redrawn by itself.

    divergence: (learned, oracle) prompt id -> mean KL (nats), keeps
    refused:    (learned, oracle) prompt id -> refused, edit prompts; other buckets are not looked at
    buckets:    prompt id -> bucket value; groups: prompt id -> group
    """
    learned, oracle = divergence
    require_known([*learned, *oracle, *refused[0], *refused[1]], buckets, "bucket")

    def of(values: Mapping[str, float], bucket: Bucket) -> dict[str, float]:
        return {i: v for i, v in values.items() if buckets[i] == bucket}

    def route(bucket: Bucket) -> Resampled:
        return preservation_difference(of(oracle, bucket), of(learned, bucket), groups, seed=seed)

    edit = rate_difference(of(refused[0], Bucket.EDIT), of(refused[1], Bucket.EDIT), groups, seed=seed)
    return OracleGapIntervals(route_benign=route(Bucket.BENIGN_KEEP), route_harmful=route(Bucket.HARMFUL_KEEP), edit=edit)


def by_group(
    columns: Sequence[Mapping[K, float]],
    groups: Mapping[K, str],
    statistic: Statistic,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Resampled:
    """A statistic of column means, with the expanded percentile interval over redrawn groups.

    columns:   mappings with the same keys, a finite value each; drawing a group draws its values in all columns, so
               that a difference of columns stays paired
    groups:    key -> group, for at least these keys
    statistic: (..., columns) means -> (...)
    raises ValueError where columns differ in their keys, a key has no group, or a value is not finite

    The percentile interval is transformation-respecting, so that of exp(-mean KL) is that of the mean KL; widened for
    few groups as by T. Hesterberg, What teachers should know about the bootstrap, The American Statistician 69 (2015)
    371-386, with groups in the place of observations.
    """
    for column in columns[1:]:
        require_same_ids(columns[0], column)
    require_known(columns[0], groups, "group")
    sums, counts = _group_sums(columns, groups)
    n, n_groups = int(counts.sum()), len(counts)
    if n == 0:
        return Resampled(value=None, low=None, high=None, se=None, n=0, groups=0)
    value = float(statistic(sums.sum(axis=0) / n))
    if n_groups == 1:
        return Resampled(value=value, low=None, high=None, se=None, n=n, groups=1)
    if all(len(set(column.values())) == 1 for column in columns):
        # Every redrawing is the same; computed, its limits would differ from the value by rounding.
        return Resampled(value=value, low=value, high=value, se=0.0, n=n, groups=n_groups)
    drawn = statistic(_redrawn_means(sums, counts, seed, resamples))
    tail = expanded_tail(n_groups, confidence)
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Resampled(value=value, low=float(low), high=float(high), se=float(drawn.std()), n=n, groups=n_groups)


def expanded_tail(n_groups: int, confidence: float = CONFIDENCE) -> float:
    """Share of redrawn figures cut off on each side; (1 - confidence) / 2 in the limit of many groups.

    The variance of redrawn means is (n - 1) / n of the unbiased one, and a normal quantile takes it for known; both
    matter below thirty groups. With two groups almost nothing is cut off.
    """
    t = stats.t.ppf((1 + confidence) / 2, n_groups - 1)
    return float(stats.norm.cdf(-math.sqrt(n_groups / (n_groups - 1)) * t))


def effective_n(found: Resampled, independent: float) -> float:
    """How many independent answers say as much as the n answers of at least two groups: n over the design effect.

    independent: squared standard error that n independent answers would have; 0 where all are equal, and then every
                 group counts as one answer, the least it can

    The quotient of normal and t quantile makes up for few groups, whose spread is itself hardly known. E. Korn and
    B. Graubard, Confidence intervals for proportions with small expected number of positive counts estimated from
    survey data, Survey Methodology 24 (1998) 193-201, who put this n into an exact interval.
    """
    if found.groups == found.n:
        return float(found.n)
    # Never below 1: with few groups a small spread between them is luck, not more information.
    measured = found.se**2 * found.groups / (found.groups - 1)
    effect = max(1.0, measured / independent) if independent > 0 else found.n / found.groups
    z, t = stats.norm.ppf((1 + CONFIDENCE) / 2), stats.t.ppf((1 + CONFIDENCE) / 2, found.groups - 1)
    return float(found.n / effect * (z / t) ** 2)


def _wilson_limits(rate: float, n: float) -> tuple[float, float]:
    """Wilson's score interval for an n that need not be whole, as effective numbers of answers are."""
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    centre = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # Rounding alone can pass 0 or 1, or leave the limit beside a rate of exactly 0 or 1.
    low = 0.0 if rate == 0 else max(0.0, (centre - spread) / (1 + z * z / n))
    high = 1.0 if rate == 1 else min(1.0, (centre + spread) / (1 + z * z / n))
    return low, high


def _group_sums(columns: Sequence[Mapping[K, float]], groups: Mapping[K, str]) -> tuple[np.ndarray, np.ndarray]:
    """(groups, columns) float64 sums and (groups,) counts, groups by name: the order of a mapping decides nothing."""
    bad = sorted(str(k) for k in columns[0] if not all(math.isfinite(column[k]) for column in columns))
    if bad:
        raise ValueError(f"{len(bad)} prompts have a value that is not finite: {', '.join(bad[:5])}. Leave none in.")
    members: dict[str, list[K]] = {}
    for key in columns[0]:
        members.setdefault(groups[key], []).append(key)
    ordered = [members[name] for name in sorted(members)]
    # fsum, because its result does not depend on the order either.
    sums = [[math.fsum(column[k] for k in keys) for column in columns] for keys in ordered]
    counts = [len(keys) for keys in ordered]
    return np.array(sums).reshape(len(ordered), len(columns)), np.array(counts, dtype=np.int64)


def _redrawn_means(sums: np.ndarray, counts: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """(resamples, columns): means over as many groups as there are, drawn with replacement.

    A ratio of sums, because redrawn groups of unequal size hold unequal numbers of prompts.
    """
    rng = np.random.default_rng(seed)
    n_groups = len(counts)
    rows = max(1, CHUNK // n_groups)
    means = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(n_groups, size=(min(rows, resamples - start), n_groups))
        totals = np.stack([column[drawn].sum(axis=1) for column in sums.T], axis=1)
        means.append(totals / counts[drawn].sum(axis=1)[:, None])
    return np.concatenate(means)


def mean(means: np.ndarray) -> np.ndarray:
    """The mean of one column: a rate, where its values are yes or no."""
    return means[..., 0]


def score(means: np.ndarray) -> np.ndarray:
    """Preservation from the mean KL of one column (A.2)."""
    return np.exp(-means[..., 0])


def score_difference(means: np.ndarray) -> np.ndarray:
    """Preservation of the first column minus that of the second."""
    return np.exp(-means[..., 0]) - np.exp(-means[..., 1])


def mean_difference(means: np.ndarray) -> np.ndarray:
    """Mean of the first column minus that of the second."""
    return means[..., 0] - means[..., 1]
