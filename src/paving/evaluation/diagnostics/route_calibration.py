"""Route calibration, selectivity and the veto's operating points, in the shape of Residual Paving's table 20."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paving.evaluation.results import Rate
from paving.evaluation.routing import reliability
from paving.evaluation.statistics import wilson
from paving.prompts.types import Bucket


@dataclass(frozen=True)
class RouteView:
    """What one way of routing does on the held-out prompts. Keys of the dicts are bucket values.

    brier, ece  of the effective gate as a probability that the prompt is an edit prompt, in [0, 1]
    accuracy    gate open on edit prompts, closed on keeps
    strength    mean gate times scale
    vetoed      share of all prompts of the bucket that the veto would close; None for a route without one
    """

    name: str
    brier: float | None
    ece: float | None
    accuracy: Rate
    active: dict[str, Rate]
    strength: dict[str, float | None]
    vetoed: dict[str, Rate] | None


def route_view(
    name: str,
    gates: Mapping[str, Sequence[float]],
    *,
    scale: float,
    vetoed: Mapping[str, Sequence[bool]] | None = None,
    active_above: float = 0.0,
) -> RouteView:
    """gates: effective gate in [0, 1] per prompt of each bucket value, after the veto.

    active_above: a gate counts as open above this; 0 for a gate that is exactly closed where it is closed
    """
    p = np.array([g for b in Bucket for g in gates[b]])
    y = np.array([float(b == Bucket.EDIT) for b in Bucket for _ in gates[b]])
    bins = reliability(p, y)
    right = int(((p > active_above) == (y > 0)).sum())
    return RouteView(
        name=name,
        brier=float(((p - y) ** 2).mean()) if len(p) else None,
        ece=sum(b.n * abs(b.mean_probability - b.edit_share) for b in bins if b.n) / len(p) if len(p) else None,
        accuracy=wilson(right, len(p)),
        active={b.value: _share([g > active_above for g in gates[b]]) for b in Bucket},
        strength={b.value: scale * float(np.mean(gates[b])) if len(gates[b]) else None for b in Bucket},
        vetoed=None if vetoed is None else {b.value: _share(vetoed[b]) for b in Bucket},
    )


@dataclass(frozen=True)
class VetoPoint:
    """One veto threshold on the held-out prompts: a prompt is vetoed where its veto logit exceeds it.

    vetoed    share of each bucket: false positives on edit and benign keeps, recall on harmful keeps
    accuracy  harmful keeps vetoed, all others not
    """

    name: str
    threshold: float
    accuracy: Rate
    vetoed: dict[str, Rate]


def veto_point(name: str, logits: Mapping[str, Sequence[float]], threshold: float) -> VetoPoint:
    """logits: veto logits of the held-out prompts per bucket value."""
    vetoed = {b: [v > threshold for v in logits[b]] for b in Bucket}
    right = sum(flag == (b == Bucket.HARMFUL_KEEP) for b, flags in vetoed.items() for flag in flags)
    return VetoPoint(
        name=name,
        threshold=threshold,
        accuracy=wilson(right, sum(len(flags) for flags in vetoed.values())),
        vetoed={b.value: _share(flags) for b, flags in vetoed.items()},
    )


def tied_thresholds(logits: Sequence[float], is_harmful: Sequence[bool]) -> tuple[float, float] | None:
    """Lowest and highest of the thresholds with the best training accuracy (A.4's tie break); None without prompts.

    logits: veto logits of the training prompts. Candidates lie half-way between neighbours, and 1 beyond either end.
    The high one closes on fewest edit prompts, the low one on most harmful keeps; both fit the training prompts alike.
    """
    if not len(logits):
        return None
    values = np.sort(np.asarray(logits, dtype=float))
    candidates = np.concatenate([values[:1] - 1.0, (values[:-1] + values[1:]) / 2, values[-1:] + 1.0])
    vetoed = np.asarray(logits, dtype=float)[None, :] > candidates[:, None]
    accuracy = (vetoed == np.asarray(is_harmful, dtype=bool)[None, :]).mean(axis=1)
    best = candidates[accuracy >= accuracy.max() - 1e-9]
    return float(best.min()), float(best.max())


def veto_curve(logits: Mapping[str, Sequence[float]], n_points: int = 61) -> list[VetoPoint]:
    """Operating points over thresholds that span the held-out logits, lowest first; empty without logits."""
    every = [v for values in logits.values() for v in values]
    if not every:
        return []
    thresholds = np.linspace(min(every) - 1e-3, max(every) + 1e-3, n_points)
    return [veto_point("", logits, float(t)) for t in thresholds]


def _share(flags: Sequence[bool]) -> Rate:
    return wilson(sum(map(bool, flags)), len(flags))
