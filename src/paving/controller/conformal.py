"""Conformal p-values of a prompt: how its gate logit stands among those of calibration prompts of each bucket.

p(harmful keep) = (1 + #{harmful keeps whose logit is at least the prompt's}) / (n + 1), and p(edit) the same from the other
side (Vovk et al. 2005; Angelopoulos and Bates, arXiv 2107.07511). For a prompt drawn like the calibration's harmful keeps,
P(p ≤ α) ≤ α on average over such draws: a weaker promise than `training.promise`, which holds with a stated confidence,
and one that says something of every single prompt.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from paving.controller.gates import CONFORMAL, Conformal
from paving.prompts.types import Bucket, Prompt

Verdict = Literal["edit", "keep", "abstain"]


class PValues(NamedTuple):
    """Of one prompt, against each bucket; None for a bucket without calibration prompts.

    A low one speaks against the bucket: "a prompt of it would seldom score like this".
    """

    edit: float | None
    benign_keep: float | None
    harmful_keep: float | None


@dataclass(frozen=True)
class Reference:
    """Gate logits of calibration prompts by bucket, sorted upwards. Prompts of one group count once: keeps by the highest
    of their logits, edit prompts by the lowest.

    apart  True: the gate was fitted without these prompts. False: each was scored by a gate fitted without its group
           (cross-conformal), and what the p-values promise holds only nearly
    boundary  how far calibration prompts lie from what the router was fitted on (ControllerWeights.unlikeness), sorted
           upwards, of a group the farthest; empty in controllers made before it was kept
    """

    edit: tuple[float, ...]
    benign_keep: tuple[float, ...]
    harmful_keep: tuple[float, ...]
    apart: bool = True
    boundary: tuple[float, ...] = ()

    def p_values(self, logit: float) -> PValues:
        return PValues(
            edit=_p(bisect_right(self.edit, logit), len(self.edit)),
            benign_keep=_p(len(self.benign_keep) - bisect_left(self.benign_keep, logit), len(self.benign_keep)),
            harmful_keep=_p(len(self.harmful_keep) - bisect_left(self.harmful_keep, logit), len(self.harmful_keep)),
        )

    def verdict(self, logit: float, alpha: float) -> Verdict:
        """edit: no keep would often score so high, and edit prompts do; keep: no edit prompt would often score so low, and
        keeps do; abstain: it might be either, or is like neither. The gate of `policy(alpha)` opens on `edit` alone."""
        p = self.p_values(logit)
        if None in p:
            return "abstain"
        no_edit, no_keep = p.edit <= alpha, max(p.benign_keep, p.harmful_keep) <= alpha
        if no_edit == no_keep:
            return "abstain"
        return "edit" if no_keep else "keep"

    def policy(self, alpha: float) -> Conformal:
        """The gate that opens where p ≤ alpha for both kinds of keeps and not for edit prompts.

        raises ValueError for alpha outside (0, 1), where a bucket has too few prompts for any p that low, and where
        the gate has learned from the prompts it is held against: what alpha says would not hold
        """
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1, both excluded; got {alpha:g}.")
        if not self.apart:
            raise ValueError(
                f"{CONFORMAL}:{alpha:g}: this gate was searched for with its calibration prompts, so that alpha would not "
                "hold. Search in a run that keeps them apart (paving train --promise ...), or use the hard gate."
            )
        if not self.edit:
            raise ValueError(f"{CONFORMAL}:{alpha:g} needs edit prompts in calibration; there are none.")
        keeps = (("harmful_keep", self.harmful_keep), ("benign_keep", self.benign_keep))
        above = max(_threshold(logits, bucket, alpha) for bucket, logits in keeps)
        k = _rejected(len(self.edit), alpha)
        if 0 <= k < len(self.edit):  # below this logit p(edit) ≤ alpha; at it the gate may open
            above = max(above, float(np.nextafter(np.float32(self.edit[k]), np.float32(-np.inf))))
        return Conformal(alpha, above)


def reference_of(
    logits: Sequence[float], prompts: Sequence[Prompt], *, boundary: Sequence[float] = (), apart: bool = True
) -> Reference:
    """logits: (n,), the gate's, of the prompts; boundary: (n,) or none. raises ValueError where they do not match"""
    best: dict[Bucket, dict[str, float]] = {b: {} for b in Bucket}
    for logit, prompt in zip(logits, prompts, strict=True):
        groups = best[prompt.bucket]
        worst = min if prompt.bucket is Bucket.EDIT else max
        groups[prompt.group] = worst(logit, groups.get(prompt.group, logit))
    farthest: dict[str, float] = {}
    for distance, prompt in zip(boundary, prompts, strict=True) if len(boundary) else ():
        farthest[prompt.group] = max(distance, farthest.get(prompt.group, distance))
    buckets = {b.value: tuple(sorted(groups.values())) for b, groups in best.items()}
    return Reference(**buckets, apart=apart, boundary=tuple(sorted(farthest.values())))


def as_reference(saved: Mapping[str, object]) -> Reference:
    """From JSON. raises ValueError for what is no reference"""
    try:
        numbers = {b.value: tuple(float(x) for x in saved[b.value]) for b in Bucket}
        numbers["boundary"] = tuple(float(x) for x in saved.get("boundary", ()))
        found = Reference(**numbers, apart=saved["apart"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its calibration logits are damaged: {error!r}.") from error
    if not isinstance(found.apart, bool):
        raise ValueError(f"its calibration logits are damaged: apart is {found.apart!r}, neither true nor false.")
    if any(list(values) != sorted(values) for values in numbers.values()):
        raise ValueError("its calibration logits are damaged: they are not sorted.")
    return found


def _p(as_extreme: int, n: int) -> float | None:
    return (1 + as_extreme) / (n + 1) if n else None


def _rejected(n: int, alpha: float) -> int:
    """How many of n may be as extreme as a logit whose p is still at most alpha; -1: no p is that low."""
    return sum((1 + k) / (n + 1) <= alpha for k in range(n + 1)) - 1  # as p_values counts, to the last bit


def _threshold(logits: Sequence[float], bucket: str, alpha: float) -> float:
    """The logit above which p ≤ alpha for a bucket of keeps."""
    n = len(logits)
    k = _rejected(n, alpha)
    if k < 0:
        raise ValueError(
            f"{CONFORMAL}:{alpha:g} needs {math.ceil(1 / alpha) - 1} groups of {bucket} prompts in calibration; there are "
            f"{n}, which can show {math.ceil(1000 / (n + 1)) / 1000} at the lowest."
        )
    return logits[n - 1 - k]
