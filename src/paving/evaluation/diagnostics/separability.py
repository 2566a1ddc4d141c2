"""How far a linear probe tells the buckets apart, layer by layer: what a router that reads there could know at best."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from paving.evaluation.statistics import auc
from paving.prompts.types import Bucket, Prompt

FOLDS = 5
# Strong shrinkage: there are more features than prompts. Chosen once; the AUC hardly moves between 1e-3 and 1e-1.
INVERSE_PENALTY = 1e-2


@dataclass(frozen=True)
class LayerProbe:
    """Cross-validated AUCs in [0, 1] of one layer's probes; None where a side has no prompts or too few groups."""

    layer: int
    edit_vs_harmful: float | None
    edit_vs_benign: float | None


def layer_probes(
    prompts: Sequence[Prompt],
    states: np.ndarray,
    layers: Sequence[int],
    *,
    tick: Callable[[int], None] | None = None,
) -> list[LayerProbe]:
    """states: (n_prompts, n_layers, d) float32, one row a prompt and one column a listed layer.

    Folds are made of whole groups, so that a focus word is never on both sides; a prompt's fold follows from its group
    alone, not from its place in the list.
    """
    folds = np.array([fold_of(p.group) for p in prompts])
    buckets = np.array([p.bucket.value for p in prompts])

    def against(column: int, keep: Bucket) -> float | None:
        chosen = np.isin(buckets, (Bucket.EDIT.value, keep.value))
        return probe_auc(states[chosen, column], buckets[chosen] == Bucket.EDIT.value, folds[chosen])

    found = []
    for i, layer in enumerate(layers):
        found.append(LayerProbe(layer, against(i, Bucket.HARMFUL_KEEP), against(i, Bucket.BENIGN_KEEP)))
        if tick is not None:
            tick(1)
    return found


def fold_of(group: str) -> int:
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:4], "big") % FOLDS


def probe_auc(x: np.ndarray, y: np.ndarray, folds: np.ndarray) -> float | None:
    """AUC of held-out probe scores. x: (n, d), y: (n,) bool, folds: (n,) int. None where it cannot be measured.

    Scores of different folds come from different probes, so the AUC is taken within folds and averaged by their pairs.
    """
    # Here, because the report reads this file's records and scikit-learn takes seconds to import.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    total, weight = 0.0, 0
    for fold in np.unique(folds):
        train, test = folds != fold, folds == fold
        if len(np.unique(y[train])) < 2 or len(np.unique(y[test])) < 2:
            continue
        probe = make_pipeline(
            StandardScaler(), LogisticRegression(C=INVERSE_PENALTY, class_weight="balanced", max_iter=1000)
        )
        score = probe.fit(x[train], y[train]).decision_function(x[test])
        pairs = int(y[test].sum()) * int((~y[test]).sum())
        total += pairs * auc(score[y[test]].tolist(), score[~y[test]].tolist())
        weight += pairs
    return total / weight if weight else None
