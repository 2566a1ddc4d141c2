"""Heads that could tell edit prompts from harmful keeps, and the states they read: what routing_features.py compares.

A head is fitted on rows (n, columns), on labels (edit or not) and weights, and scores other rows. All are weighted so that
both labels count the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor

from paving.backbone import Backbone, PromptBatch, checked_ids, pad_left
from paving.backbone.hooks import record_residuals
from paving.prompts.types import Prompt

C_RBF, C_LINEAR, C_ATTENTION = 10.0, 0.01, 0.01  # as the search has them
HIDDEN = 64
# Fits on (rows, labels, weights), and scores rows.
Head = Callable[[np.ndarray, np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]


def linear(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return _scaled(LogisticRegression(C=C_LINEAR, max_iter=500, class_weight="balanced"), x, y, weights)


def rbf(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return _scaled(SVC(C=C_RBF, gamma=1 / x.shape[1], class_weight="balanced"), x, y, weights)


def whitened(components: int) -> Head:
    """Principal components of equal variance, then the RBF machine."""

    def fit(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        scale = StandardScaler().fit(x)
        axes = PCA(min(components, *x.shape), whiten=True, random_state=0).fit(scale.transform(x))
        score = rbf(axes.transform(scale.transform(x)), y, weights)
        return lambda rows: score(axes.transform(scale.transform(rows)))

    return fit


def perceptron(members: int) -> Head:
    """MLPs of 64 hidden units from so many seeds; their log odds averaged."""

    def fit(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        scale = StandardScaler().fit(x)
        balance = weights * np.where(y, 0.5 / np.mean(y), 0.5 / np.mean(~y))
        nets = [
            MLPClassifier((HIDDEN,), alpha=1.0, max_iter=300, random_state=seed).fit(scale.transform(x), y, balance)
            for seed in range(members)
        ]

        def score(rows: np.ndarray) -> np.ndarray:
            odds = [np.clip(net.predict_proba(scale.transform(rows))[:, 1], 1e-6, 1 - 1e-6) for net in nets]
            return np.mean([np.log(p / (1 - p)) for p in odds], axis=0)

        return score

    return fit


def _scaled(machine, x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    scale = StandardScaler().fit(x)
    machine.fit(scale.transform(x), y, sample_weight=weights)
    return lambda rows: machine.decision_function(scale.transform(rows))


def hard_negatives(head: Head, x: np.ndarray, y: np.ndarray, weights: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """weights, but thrice for the third of the keeps that machines without their fold take most for edit prompts; keeps
    together count as much as before, or it would be the classes that were moved."""
    scores = np.zeros(len(y))
    for k in np.unique(folds):
        scores[folds == k] = head(x[folds != k], y[folds != k], weights[folds != k])(x[folds == k])
    keeps = scores[~y]
    hard = ~y & (scores >= np.sort(keeps)[::-1][max(len(keeps) // 3 - 1, 0)])
    found = np.where(hard, 3 * weights, weights)
    return np.where(y, found, found * (weights[~y].sum() / found[~y].sum()))


def attention(
    tokens: Tensor, mask: Tensor, y: np.ndarray, weights: np.ndarray, *, members: int, steps: int = 60
) -> Callable[[Tensor, Tensor], np.ndarray]:
    """A linear machine on Σ_t softmax_t(q·h_t) h_t, q learned with it; scores averaged over members, whose q start apart.

    tokens  (n, positions, columns) float32; mask (n, positions), 1 where a token stands
    The penalties are those of the linear machine, ½|w|² and ½|q|² beside C · (sum of weighted losses), so that a q of zero
    is that machine on the mean over tokens.
    """
    here = mask.bool()
    mean, std = tokens[here].mean(0), tokens[here].std(0).clamp_min(1e-6)
    labels = torch.from_numpy(y.astype(np.float32))
    balance = torch.from_numpy(weights.astype(np.float32))
    balance = balance * torch.where(labels > 0, 0.5 / labels.mean(), 0.5 / (1 - labels.mean()))
    shown = (tokens - mean) / std
    found = []
    for seed in range(members):
        start = torch.randn(tokens.shape[-1], generator=torch.Generator().manual_seed(seed))
        q = (0.3 * start / len(start) ** 0.5).requires_grad_()  # a standardised token's q·h is then about 0.3
        w, b = torch.zeros_like(start).requires_grad_(), torch.zeros(1, requires_grad=True)
        optimiser = torch.optim.LBFGS([q, w, b], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

        def closure(q=q, w=w, b=b, optimiser=optimiser) -> Tensor:
            optimiser.zero_grad()
            logits = _attended(shown, here, q) @ w + b
            losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, balance, reduction="sum")
            loss = C_ATTENTION * losses + 0.5 * (w.square().sum() + q.square().sum())
            loss.backward()
            return loss

        optimiser.step(closure)
        found.append((q.detach(), w.detach(), b.detach()))

    def score(rows: Tensor, rows_mask: Tensor) -> np.ndarray:
        rows = (rows - mean) / std
        return torch.stack([_attended(rows, rows_mask.bool(), q) @ w + b for q, w, b in found]).mean(0).numpy()

    return score


def _attended(tokens: Tensor, here: Tensor, q: Tensor) -> Tensor:
    look = (tokens @ q).masked_fill(~here, -torch.inf).softmax(-1)
    return torch.einsum("nt,ntc->nc", look, tokens)


@torch.no_grad()
def read_states(
    backbone: Backbone, prompts: Sequence[Prompt], layers: Sequence[int], *, suffix: str = "", batch_size: int = 16
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(prompt id -> part -> (blocks, ·) float32, prompt id -> (positions, blocks, d_model)) under the untouched base.

    last, mean  the last token's state; the mean over the prompt
    user        the mean over the user's own words: what no two rendered prompts share from either end
    extremes    their maximum and their minimum
    tail        all tokens after the user's words, side by side
    suffix      text that is put behind the rendered prompt, where an answer would begin
    """
    added = backbone.tokenizer(suffix, add_special_tokens=False).input_ids if suffix else []
    rows = {p.id: [*checked_ids(backbone, p), *added] for p in prompts}
    head, tail = _common(list(rows.values())), _common([row[::-1] for row in rows.values()])
    parts: dict[str, dict[str, Tensor]] = {}
    every: dict[str, Tensor] = {}
    order = sorted(rows, key=lambda i: (len(rows[i]), i))
    for start in range(0, len(order), batch_size):
        names = order[start : start + batch_size]
        ids, mask = pad_left(backbone, [rows[i] for i in names])
        batch = PromptBatch(ids, mask, tuple(names), (None,) * len(names))
        with record_residuals(backbone, layers) as seen:
            backbone.model.get_decoder()(
                input_ids=ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
            )
        states = torch.stack([seen[layer].float().cpu() for layer in layers], dim=2)
        for i, name in enumerate(names):
            resid = states[i, -len(rows[name]) :]
            words = resid[head : len(resid) - tail]
            parts[name] = {
                "last": resid[-1],
                "mean": resid.mean(0),
                "user": words.mean(0),
                "extremes": torch.cat([words.amax(0), words.amin(0)], dim=-1),
                "tail": resid[len(resid) - tail :].transpose(0, 1).flatten(1),
            }
            every[name] = resid.clone()
    return parts, every


def _common(rows: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all rows share; every row keeps one of its own."""
    shared = 0
    while all(len(row) > shared + 1 for row in rows) and len({row[shared] for row in rows}) == 1:
        shared += 1
    return shared
