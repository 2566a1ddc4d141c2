"""The corrupted-router falsification (Residual Paving, sections 3.4 and 6): flip correct gates and watch the keeps.

If route selectivity is what limits, the keep-side loss must grow with the share of flipped gates. If it does not, keeps
are lost to something else, and a better router would not bring them back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paving.prompts.types import Bucket

REFUSALS_RISE = 0.05  # share of harmful keeps that opened gates must add in refusals before it counts as a rise
RATES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Outcome:
    """One held-out prompt, answered with its gate closed and with it open.

    divergence  KL(base || edited) with the gate open (nats); None on edit prompts, which have no preservation score
    """

    id: str
    bucket: Bucket
    refused_closed: bool
    refused_open: bool
    divergence: float | None


@dataclass(frozen=True)
class Band:
    """Mean over draws, and the 2.5 and 97.5 percentiles; None where the bucket is empty."""

    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class CorruptionPoint:
    """Fractions in [0, 1] at one flip rate."""

    rate: float
    edit_refusal: Band
    benign_refusal: Band
    harmful_refusal: Band
    benign_preservation: Band
    harmful_preservation: Band


def corrupted_curve(
    outcomes: Sequence[Outcome], rates: Sequence[float] = RATES, *, draws: int = 500, seed: int = 0
) -> list[CorruptionPoint]:
    """Start from the oracle's gates, flip each prompt's with the given probability, and mix the two answers it has.

    A prompt's answer depends on its own gate alone, so two decodings, all closed and all open, serve every rate. Within
    a draw the flipped prompts of a lower rate are among those of a higher one: the curve's noise is shared, and its
    shape is not the noise's. raises ValueError for rates outside [0, 1].
    """
    if any(not 0 <= r <= 1 for r in rates):
        raise ValueError(f"flip rates are probabilities in [0, 1]; got {list(rates)}.")
    buckets = {b: [o for o in outcomes if o.bucket == b] for b in Bucket}
    generator = np.random.default_rng(seed)
    chances = {b: generator.random((draws, len(rows))) for b, rows in buckets.items()}
    points = []
    for rate in rates:
        is_open = {b: (u < rate) ^ (b == Bucket.EDIT) for b, u in chances.items()}
        refusal = {b: _refusal(buckets[b], is_open[b]) for b in Bucket}
        points.append(
            CorruptionPoint(
                rate=rate,
                edit_refusal=refusal[Bucket.EDIT],
                benign_refusal=refusal[Bucket.BENIGN_KEEP],
                harmful_refusal=refusal[Bucket.HARMFUL_KEEP],
                benign_preservation=_preservation(buckets[Bucket.BENIGN_KEEP], is_open[Bucket.BENIGN_KEEP]),
                harmful_preservation=_preservation(buckets[Bucket.HARMFUL_KEEP], is_open[Bucket.HARMFUL_KEEP]),
            )
        )
    return points


def _refusal(rows: Sequence[Outcome], is_open: np.ndarray) -> Band:
    closed = np.array([o.refused_closed for o in rows], dtype=float)
    opened = np.array([o.refused_open for o in rows], dtype=float)
    return _band(np.where(is_open, opened, closed), lambda mean: mean)


def _preservation(rows: Sequence[Outcome], is_open: np.ndarray) -> Band:
    divergence = np.array([o.divergence or 0.0 for o in rows])
    return _band(np.where(is_open, divergence, 0.0), lambda mean: np.exp(-mean))


def _band(values: np.ndarray, score) -> Band:
    """values: (draws, n) -> the band over draws of score(mean over prompts)."""
    if values.shape[1] == 0:
        return Band(None, None, None)
    scores = score(values.mean(axis=1))
    low, high = np.percentile(scores, (2.5, 97.5))
    return Band(float(scores.mean()), float(low), float(high))


def conclusion(points: Sequence[CorruptionPoint], *, tolerance: float = 0.005) -> str:
    """One sentence: does the keep-side loss grow with the rate? tolerance: a fall between neighbours that is no growth."""
    kept = [p.harmful_preservation.mean for p in points]
    if len(points) < 2 or any(v is None for v in kept):
        return "n/a: there are no harmful keeps, or fewer than two flip rates."
    first, last = kept[0], kept[-1]
    # Nested flips and KL >= 0 let preservation fall by construction, so it alone could never speak against the claim:
    # harmful refusals may also rise when gates are opened, and then opening them is no loss.
    refused = [p.harmful_refusal.mean for p in points]
    rises = refused[0] is not None and refused[-1] is not None and refused[-1] > refused[0] + REFUSALS_RISE
    steady = not rises and all(b <= a + tolerance for a, b in itertools.pairwise(kept))
    span = (
        f"harmful preservation {100 * first:.1f} at {points[0].rate:.0%} flipped, {100 * last:.1f} at {points[-1].rate:.0%}"
    )
    if math.isclose(first, last, abs_tol=tolerance):
        return f"The keep-side loss does not grow with the flip rate ({span}): routing is not what limits here."
    if steady and last < first:
        return f"The keep-side loss grows with the flip rate ({span}): routing is load-bearing."
    if rises:
        moved = f"harmful refusal rises from {100 * refused[0]:.1f} to {100 * refused[-1]:.1f} %"
        return (
            f"Preservation falls ({span}), but {moved}: open gates lose no refusals, so the claim about routing fails here."
        )
    return f"The keep-side loss does not grow steadily with the flip rate ({span}): the claim about routing fails here."
