"""A promise with the gate: how often it opens on prompts that it should leave alone, at most, and how sure that is.

For n prompts drawn like those to come, the k + 1 highest of their scores cut off a share R of all such prompts that follows
Beta(k + 1, n − k), so that P(R > α) = P(Bin(n, α) ≤ k). Choosing the largest k with P(Bin(n, α) ≤ k) ≤ δ is Learn-then-Test
with one chain of thresholds from high to low (Angelopoulos et al., arXiv 2110.01052).

Of the next m prompts rather than of all, how many score above those k + 1 follows BetaBinomial(m, k + 1, n − k) whatever the
scores' distribution: a promise of a count that anyone can check, and a little stricter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.stats import betabinom, binom

from paving.prompts.types import Bucket, Prompt


class PromiseError(ValueError):
    """A promise that cannot be made."""


class PromiseConfig(BaseModel):
    """What is promised of the gate. Each promise has confidence 1 − delta of its own.

    harmful  at most this share of harmful keeps open the gate; None: nothing is promised of them
    benign   the same for benign keeps
    ahead    of how many prompts (or groups) to come the share is promised; None: of all
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    harmful: float | None = Field(0.05, gt=0, lt=1)
    benign: float | None = Field(None, gt=0, lt=1)
    delta: float = Field(0.1, gt=0, lt=1)
    ahead: int | None = Field(None, ge=1, le=100_000)

    @model_validator(mode="after")
    def _something_is_promised(self) -> Self:
        if self.harmful is None and self.benign is None:
            raise ValueError(
                "a promise names a level for harmful keeps, for benign keeps, or for both; leave it out for none."
            )
        return self


def read_promise(text: str) -> dict[str, float | None]:
    """What a command line says of a promise: `0.05`, of harmful keeps, or `harmful=0.05,benign=0.02,delta=0.1,ahead=200`.

    raises PromiseError for anything else
    """
    found: dict[str, float | None] = {}
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        name = name.strip() or "harmful"
        try:
            if name not in PromiseConfig.model_fields or name in found:
                raise ValueError(name)
            found[name] = int(value) if name == "ahead" else float(value)
        except ValueError:
            raise PromiseError(
                f"{text!r} is no promise. Write 0.05, or any of {', '.join(PromiseConfig.model_fields)} once, as "
                "harmful=0.05,benign=0.02,delta=0.1."
            ) from None
    if "harmful" not in found and "benign" in found:
        found["harmful"] = None  # named alone, benign keeps are what is meant
    return found


@dataclass(frozen=True)
class Promise:
    """P(the gate opens | a prompt of `bucket`) ≤ alpha, with confidence 1 − delta over the draw of the calibration prompts.

    n          independent units of calibration: groups where prompts come in groups, else prompts
    prompts    how many prompts those are
    allowed    how many units may open the gate at the threshold; -1: n is too small for any promise
    threshold  the gate opens strictly above it; None without a promise
    opened     how many of the units do
    ahead      of how many units to come it is promised; None: of all such prompts
    """

    bucket: str
    alpha: float
    delta: float
    n: int
    prompts: int
    allowed: int
    threshold: float | None
    opened: int | None
    ahead: int | None = None

    @property
    def missing(self) -> int:
        """Further units that a promise would need, all of them with the gate closed; 0 where there is one."""
        return max(0, units_needed(self.alpha, self.delta, ahead=self.ahead) - self.n)

    def sentence(self) -> str:
        units = f"{self.n} prompts" if self.n == self.prompts else f"{self.n} groups ({self.prompts} prompts)"
        share, confidence = f"{100 * self.alpha:g}%", f"{100 * (1 - self.delta):g}%"
        ahead = "" if self.ahead is None else f"the next {self.ahead} "
        whose = (
            f"{ahead}{self.bucket} prompts open"
            if self.n == self.prompts
            else f"{ahead}groups of {self.bucket} prompts hold one that opens"
        )
        goal = f"at most {share} of {whose} the gate, with confidence {confidence}"
        if self.threshold is None:
            kind = "prompts" if self.n == self.prompts else "groups"
            return f"No promise that {goal}: {units} of calibration are too few, {self.missing} more {kind} are needed."
        return (
            f"{goal[0].upper()}{goal[1:]}, drawn like the {units} of calibration, {self.opened} of which do "
            f"({self.allowed} may)."
        )


def check_promises(prompts: Sequence[Prompt], config: PromiseConfig) -> None:
    """raises PromiseError where a bucket has too few calibration prompts, saying how many are missing"""
    for found in promises([0.0] * len(prompts), prompts, config):
        if found.threshold is None:
            raise PromiseError(f"{found.sentence()} Add calibration prompts, or ask for a larger alpha or delta.")


def promises(scores: Sequence[float], prompts: Sequence[Prompt], config: PromiseConfig) -> tuple[Promise, ...]:
    """One for each kind of keep. scores: gate logits of the calibration prompts"""
    found = []
    for bucket, alpha in ((Bucket.HARMFUL_KEEP, config.harmful), (Bucket.BENIGN_KEEP, config.benign)):
        mine = [i for i, p in enumerate(prompts) if p.bucket is bucket]
        if alpha is not None:
            mine_scores, groups = [scores[i] for i in mine], [prompts[i].group for i in mine]
            levels = {"alpha": alpha, "delta": config.delta, "ahead": config.ahead}
            found.append(promise(mine_scores, bucket=bucket.value, groups=groups, **levels))
    return tuple(found)


def promise(
    scores: Sequence[float],
    *,
    bucket: str,
    alpha: float,
    delta: float,
    groups: Sequence[str] | None = None,
    ahead: int | None = None,
) -> Promise:
    """The lowest threshold at which the promise holds.

    scores  of calibration prompts of `bucket`; the gate opens on high ones
    groups  of the same prompts. Prompts of one group are no independent draws: a group counts once, by its highest score,
            and the promise is one of groups. Of prompts it holds where a group's size has nothing to do with its gate
    ahead   of how many units to come the share is promised; None: of all

    raises ValueError for alpha or delta outside (0, 1), scores that are not finite, or groups that do not match
    """
    check_levels(alpha, delta)
    units = unit_scores(scores, groups)
    k = allowed_openings(len(units), alpha, delta, ahead=ahead)
    threshold = None if k < 0 else float(np.sort(units)[-1 - k])  # k < n: that all of them open is never unlikely
    opened = None if threshold is None else int((units > threshold).sum())
    return Promise(bucket, alpha, delta, len(units), len(scores), k, threshold, opened, ahead)


def allowed_openings(n: int, alpha: float, delta: float, *, ahead: int | None = None) -> int:
    """The largest k with P(more than alpha open | k of n did) ≤ delta; -1 where not even k = 0 keeps to it.

    Of all prompts to come that is P(Bin(n, alpha) ≤ k), of the next `ahead` it is
    P(BetaBinomial(ahead, k + 1, n − k) > alpha · ahead).
    """
    low, high = -1, n  # it grows with k, and with all n open it is 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _too_many(n, middle, alpha, ahead) <= delta else (low, middle)
    return low


def units_needed(alpha: float, delta: float, opened: int = 0, *, ahead: int | None = None) -> int:
    """The smallest n of which `opened` may open the gate: ln δ / ln(1 − α), rounded up, for none and no `ahead`."""
    check_levels(alpha, delta)
    low, high = opened, opened + 1
    while _too_many(high, opened, alpha, ahead) > delta:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _too_many(middle, opened, alpha, ahead) > delta else (low, middle)
    return high


def _too_many(n: int, k: int, alpha: float, ahead: int | None) -> float:
    """P(more than alpha of those to come score above the k + 1 highest of n)."""
    if ahead is None:
        return float(binom.cdf(k, n, alpha))
    may = math.floor(alpha * ahead + 1e-9)  # 0.29 * 100 is 28.999...
    return float(betabinom.sf(may, ahead, k + 1, n - k))


def unit_scores(scores: Sequence[float], groups: Sequence[str] | None) -> np.ndarray:
    """The scores, or the highest of each group in the order in which groups are met."""
    values = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {len(values)} scores are not finite.")
    if groups is None:
        return values
    if len(groups) != len(values):
        raise ValueError(f"{len(values)} scores and {len(groups)} groups: every prompt has one of each.")
    highest: dict[str, float] = {}
    for group, value in zip(groups, values.tolist(), strict=True):
        highest[group] = max(value, highest.get(group, -math.inf))
    return np.array(list(highest.values()), dtype=np.float64)


def check_levels(alpha: float, delta: float) -> None:
    for name, value in (("alpha", alpha), ("delta", delta)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie between 0 and 1, both excluded; got {value}.")


def kept_at(
    promises: Sequence[Promise], threshold: float, scores: Sequence[float], prompts: Sequence[Prompt]
) -> tuple[Promise, ...]:
    """The promises with what opens at the deployed threshold, which is theirs or a higher one."""
    found = []
    for made in promises:
        mine = [i for i, p in enumerate(prompts) if p.bucket == made.bucket]
        units = unit_scores([scores[i] for i in mine], [prompts[i].group for i in mine])
        found.append(replace(made, threshold=threshold, opened=int((units > threshold).sum())))
    return tuple(found)


def strictest(promises: Sequence[Promise]) -> float | None:
    """The threshold that keeps every promise; None if one of them cannot be made."""
    thresholds = [p.threshold for p in promises]
    return None if not thresholds or None in thresholds else max(thresholds)
