"""One figure from several runs: how far seeds differ, and what their pooled answers say without counting any twice.

Two different things vary. Another seed trains another controller and draws another split: `Spread` shows that. The
prompts are a sample too: the pooled intervals show that, for these very runs. Neither contains the other.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from scipy import stats

from paving.evaluation.paired import PairedRates, paired_rates, require_known
from paving.evaluation.resampling import Resampled, by_group, rate_difference, rate_interval, score
from paving.evaluation.results import Rate, Record
from paving.evaluation.statistics import wilson

Answer = tuple[int, str]  # which run, which prompt


class Spread(Record):
    """A figure of every seed, in the order given (None where a run has none), and its summary over the n that have one.

    mean, least and greatest are None when n == 0; sd, with n - 1 below the sum, also when n == 1.
    """

    seeds: list[float | None]
    n: int
    mean: float | None
    least: float | None
    greatest: float | None
    sd: float | None


class PooledRate(Record):
    """Answers of several seeds added up.

    naive      as if every answer were to another prompt, with Wilson's interval; right only where repeated == 0
    by_prompt  the same rate, its interval from redrawing prompts (or their groups) with all their answers; for print
    prompts    distinct prompts; repeated: those that more than one seed held out
    """

    seeds: Spread
    naive: Rate
    by_prompt: Resampled
    prompts: int
    repeated: int


class PooledDifference(Record):
    """As `PooledRate`, for the difference of two rows; naive.p takes every pair for another prompt's, too."""

    seeds: Spread
    naive: PairedRates
    by_prompt: Resampled
    prompts: int
    repeated: int


class PooledScore(Record):
    """As `PooledRate`, for exp(-mean KL) over all answers; naive redraws answers one by one."""

    seeds: Spread
    naive: Resampled
    by_prompt: Resampled
    prompts: int
    repeated: int


class SignTest(Record):
    """How many backbones gained, and the chance of as many or more if a gain were as likely as a loss.

    ties (a gain of exactly 0) and missing figures decide nothing and are left out of p, which is None when nothing is
    left. median is over all gains there are, ties included.
    """

    positive: int
    negative: int
    ties: int
    missing: int
    median: float | None
    p: float | None


def spread(figures: Sequence[float | None]) -> Spread:
    """One figure a seed -> mean, range and standard deviation over the seeds that have one."""
    known = [f for f in figures if f is not None]
    return Spread(
        seeds=list(figures),
        n=len(known),
        mean=statistics.fmean(known) if known else None,
        least=min(known, default=None),
        greatest=max(known, default=None),
        sd=statistics.stdev(known) if len(known) > 1 else None,
    )


def pooled_rate(
    refused: Sequence[Mapping[str, bool]], groups: Mapping[str, str] | None = None, *, seed: int = 0
) -> PooledRate:
    """A row's rate over several runs, of one bucket.

    refused: for every seed, held-out prompt id -> refused
    groups:  prompt id -> group, where prompts of a group shall be redrawn together; each prompt by itself without
    """
    answers = _answers(refused)
    rates = [wilson(sum(map(bool, run.values())), len(run)).rate for run in refused]
    return PooledRate(
        seeds=spread(rates),
        naive=wilson(sum(map(bool, answers.values())), len(answers)),
        by_prompt=rate_interval(answers, _group_of(answers, groups), seed=seed),
        prompts=len({i for _, i in answers}),
        repeated=_repeated(refused),
    )


def pooled_difference(
    row: Sequence[Mapping[str, bool]],
    reference: Sequence[Mapping[str, bool]],
    groups: Mapping[str, str] | None = None,
    *,
    seed: int = 0,
) -> PooledDifference:
    """A row's rate minus the reference row's over several runs, such as harmful drift; arguments as for `pooled_rate`.

    raises ValueError unless both have the same runs, and each run the same prompts in both
    """
    if len(row) != len(reference):
        raise ValueError(f"{len(row)} runs of the row and {len(reference)} of the reference: give each run's both.")
    ours, theirs = _answers(row), _answers(reference)
    each = [paired_rates(one, other).difference for one, other in zip(row, reference, strict=True)]
    return PooledDifference(
        seeds=spread(each),
        naive=paired_rates(ours, theirs),
        by_prompt=rate_difference(ours, theirs, _group_of(ours, groups), seed=seed),
        prompts=len({i for _, i in ours}),
        repeated=_repeated(row),
    )


def pooled_score(
    divergence: Sequence[Mapping[str, float]], groups: Mapping[str, str] | None = None, *, seed: int = 0
) -> PooledScore:
    """A row's preservation over several runs, of one bucket; divergence: for every seed, prompt id -> KL (nats)."""
    answers = _answers(divergence)
    each = [math.exp(-statistics.fmean(run.values())) if run else None for run in divergence]
    return PooledScore(
        seeds=spread(each),
        naive=by_group([answers], {a: repr(a) for a in answers}, score, seed=seed),
        by_prompt=by_group([answers], _group_of(answers, groups), score, seed=seed),
        prompts=len({i for _, i in answers}),
        repeated=_repeated(divergence),
    )


def sign_test(gains: Sequence[float | None]) -> SignTest:
    """One-sided exact sign test of paired gains, one a backbone (Residual Paving, sections 4 and 4.3; None: missing)."""
    known = [g for g in gains if g is not None]
    if any(math.isnan(g) for g in known):
        raise ValueError("a gain is NaN, which is neither above nor below 0: give None for a missing one.")
    positive, negative = sum(g > 0 for g in known), sum(g < 0 for g in known)
    decided = positive + negative
    return SignTest(
        positive=positive,
        negative=negative,
        ties=len(known) - decided,
        missing=len(gains) - len(known),
        median=statistics.median(known) if known else None,
        p=float(stats.binomtest(positive, decided, alternative="greater").pvalue) if decided else None,
    )


def _answers(runs: Sequence[Mapping[str, float]]) -> dict[Answer, float]:
    return {(run, i): value for run, values in enumerate(runs) for i, value in values.items()}


def _group_of(answers: Iterable[Answer], groups: Mapping[str, str] | None) -> dict[Answer, str]:
    """Answers of all seeds to one prompt belong together, and so do those to the prompts of one group."""
    if groups is None:
        return {a: a[1] for a in answers}
    require_known({i for _, i in answers}, groups, "group")
    return {a: groups[a[1]] for a in answers}


def _repeated(runs: Sequence[Mapping[str, float]]) -> int:
    """How many prompts stand in more than one run."""
    return sum(count > 1 for count in Counter(i for run in runs for i in run).values())
