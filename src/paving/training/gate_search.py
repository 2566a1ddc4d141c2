"""Choose what a gate reads, which machine decides, and what it learns from, by prompts that no candidate has seen.

Every candidate is fitted on four fifths of the groups of training and calibration prompts and scores the fifth that is
left out; held-out prompts have no part in it. Two stages: one machine tells edit prompts from harmful keeps, and may learn
from contrast pairs as well; the other tells them from benign keeps. Each is given the lowest threshold at which no more
than a chosen share of its keeps would open. A third closes on prompts farther from all that were seen than edit prompts are
from those of other groups: what the others say of such a prompt is worth nothing (a kernel machine says its bias).

A candidate is chosen on prompts as they are. Copies in other clothes (prompts.clothes), where there are any, then teach all
three machines, and count among the keeps that the thresholds hold back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from paving.controller.gate_machines import UNLIKE, Kernel, Machine, MachineShape
from paving.prompts.clothes import WARDROBE
from paving.prompts.contrasts import groups_near
from paving.prompts.types import Bucket, Prompt
from paving.traces.prompt_states import PromptStates

Tick = Callable[[int], None]
LOW_FALSE_RATE = 0.1  # candidates are compared where few keeps open: the area under the curve up to here
C_RBF, C_LINEAR = 10.0, 0.01


class GateSearch(BaseModel):
    """What is tried, and how much may leak.

    layers    sets of blocks to read; None: five sets from the middle of the network
    contrast  `starter`, a JSONL file of pairs (see prompts.contrasts), or `none`
    harmful   highest share of harmful keeps, out of fold, that may open the gate
    benign    the same for benign keeps
    unlike    share of edit prompts that are taken for unlike the others, and stay closed; None: whatever comes is judged
    clothes   copies of each prompt in other clothes that the gate learns from as well (prompts.clothes)

    With clothes the last token alone is read unless poolings are given: a mean over the prompt moves with the words around
    what is asked, and harmful keeps behind a wording never seen came through with it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[tuple[int, ...], ...] | None = Field(None, min_length=1)
    poolings: tuple[Literal["last", "mean", "last+mean"], ...] = Field(("last", "last+mean"), min_length=1)
    kernels: tuple[Kernel, ...] = Field(("rbf", "linear"), min_length=1)
    contrast: str = "starter"
    harmful: float = Field(0.02, gt=0, lt=1)
    benign: float = Field(0.03, gt=0, lt=1)
    unlike: float | None = Field(0.02, gt=0, lt=1)
    clothes: int = Field(0, ge=0, le=len(WARDROBE))
    folds: int = Field(5, ge=2)
    shuffles: int = Field(2, ge=1)
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _no_mean_in_clothes(cls, given: dict) -> dict:
        return {"poolings": ("last",), **given} if given.get("clothes") else given


@dataclass(frozen=True)
class Tried:
    """One candidate for the boundary machine, out of fold: AUC edit against harmful keep, the same where few keeps open
    (0.5 by chance), and the share of edit prompts that open at the allowed share of harmful keeps."""

    layers: tuple[int, ...]
    pooling: str
    kernel: Kernel
    contrast: str
    auc: float
    partial_auc: float
    opened: float

    def reads(self) -> str:
        return f"{self.pooling}, blocks {', '.join(map(str, self.layers))}"


@dataclass(frozen=True)
class FoundGate:
    """machines  whose columns count within the features of `layers` and `pooling`
    tried     best first
    opened    share of each bucket that opens out of fold, at the thresholds chosen
    dressed   the same of the copies in other clothes; None without any
    logits    (shuffles, n) of the gate out of fold, for the prompts that were searched with and the copies behind them
    """

    layers: tuple[int, ...]
    pooling: str
    machines: tuple[Machine, ...]
    shapes: tuple[MachineShape, ...]
    tried: tuple[Tried, ...]
    opened: Mapping[str, float]
    dressed: Mapping[str, float] | None
    logits: np.ndarray

    def why(self) -> str:
        best = self.tried[0]
        return (
            f"{best.kernel} machine on {best.reads()}, contrast pairs: {best.contrast}; the highest partial AUC "
            f"({best.partial_auc:.3f}, AUC {best.auc:.3f}) of {len(self.tried)} candidates out of fold."
        )


def default_layers(n_layers: int) -> tuple[tuple[int, ...], ...]:
    """Five sets of blocks by relative depth, between a quarter and five sixths: where probes do best."""
    depths = ((0.28, 0.41, 0.55), (0.41, 0.55, 0.69), (0.55, 0.69, 0.83), (0.48, 0.55, 0.62), (0.55,))
    sets = (tuple(sorted({round(d * (n_layers - 1)) for d in depth})) for depth in depths)
    return tuple(dict.fromkeys(sets))


def search_gate(
    states: Mapping[str, PromptStates],
    prompts: Sequence[Prompt],
    contrasts: Mapping[str, Sequence[Prompt]],
    settings: GateSearch,
    layer_sets: Sequence[tuple[int, ...]],
    *,
    dressed: Sequence[Prompt] = (),
    tick: Tick = lambda _n: None,
) -> FoundGate:
    """prompts: of all three buckets. contrasts: named sets of pairs that candidates may learn from, beside none.
    dressed: copies of prompts, in their groups, that what was chosen is fitted and given its thresholds with, too.

    raises ValueError where a bucket has fewer groups than folds
    """
    check_groups(prompts, settings.folds)
    tried: dict[Tried, np.ndarray] = {}
    near = {name: groups_near(pairs, prompts) for name, pairs in contrasts.items()}
    edit, harmful = (np.array([p.bucket is b for p in prompts]) for b in (Bucket.EDIT, Bucket.HARMFUL_KEEP))
    options = list(itertools.product(layer_sets, settings.poolings, settings.kernels, ("none", *contrasts)))
    for layers, pooling, kernel, name in options:
        pairs = near.get(name, {})
        scores = out_of_fold(states, prompts, pairs, Bucket.HARMFUL_KEEP, (layers, pooling, kernel), settings)
        both = edit | harmful
        labels, values = np.tile(edit[both], settings.shuffles), scores[:, both].ravel()
        threshold = threshold_at(scores[:, harmful], settings.harmful)
        found = Tried(
            layers=layers,
            pooling=pooling,
            kernel=kernel,
            contrast=name,
            auc=float(roc_auc_score(labels, values)),
            partial_auc=float(roc_auc_score(labels, values, max_fpr=LOW_FALSE_RATE)),
            opened=float((scores[:, edit] > threshold).mean()),
        )
        tried[found] = scores
        tick(1)
    ranked = sorted(tried, key=lambda t: -t.partial_auc)
    best = ranked[0]
    read = (best.layers, best.pooling, best.kernel)
    scores = tried[best]
    if dressed:  # what was tried is compared on prompts as they are: every candidate on every copy would take hours
        prompts = [*prompts, *dressed]
        scores = out_of_fold(states, prompts, near.get(best.contrast, {}), Bucket.HARMFUL_KEEP, read, settings)
    keep_scores = out_of_fold(states, prompts, {}, Bucket.BENIGN_KEEP, read, settings)
    tick(1)
    edit = np.array([p.bucket is Bucket.EDIT for p in prompts])
    logits = np.full(scores.shape, np.inf)
    machines, shapes = [], []
    for keep, scored, pairs, share in (
        (Bucket.HARMFUL_KEEP, scores, contrasts.get(best.contrast, ()), settings.harmful),
        (Bucket.BENIGN_KEEP, keep_scores, (), settings.benign),
    ):
        ours = np.array([p.bucket is keep for p in prompts])
        threshold = threshold_at(scored[:, ours], share)
        slope = slope_of(scored[:, edit], scored[:, ours])
        machine, shape = fitted(states, [*rows_for(prompts, keep), *pairs], keep, read)
        machine.threshold.fill_(threshold)
        machine.slope.fill_(slope)
        machines.append(machine)
        shapes.append(shape)
        logits = np.minimum(logits, slope * (scored - threshold))
    if settings.unlike is not None:
        machine, shape, alike = likeness(states, prompts, best.layers, best.pooling, settings.unlike)
        machines.append(machine)
        shapes.append(shape)
        logits = np.minimum(logits, alike)
    n = len(prompts) - len(dressed)
    shares = opened_shares(logits[:, :n], prompts[:n]), opened_shares(logits[:, n:], dressed) if dressed else None
    return FoundGate(best.layers, best.pooling, tuple(machines), tuple(shapes), tuple(ranked), *shares, logits)


def opened_shares(logits: np.ndarray, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Bucket -> the share of its prompts with logits (shuffles, n) above 0."""
    return {b.value: float((logits > 0)[:, np.array([p.bucket is b for p in prompts])].mean()) for b in Bucket}


Read = tuple[tuple[int, ...], str, Kernel]


def out_of_fold(
    states: Mapping[str, PromptStates],
    prompts: Sequence[Prompt],
    pairs: Mapping[Prompt, frozenset[str]],
    keep: Bucket,
    read: Read,
    settings: GateSearch,
) -> np.ndarray:
    """(shuffles, n) scores, each of a machine that has seen no prompt of the row's group, and no pair of it or like it.

    pairs   a contrast pair's prompt -> the groups that it must not help to judge (prompts.contrasts.groups_near)
    """
    layers, pooling, kernel = read
    x, extra = features(states, prompts, layers, pooling), features(states, list(pairs), layers, pooling)
    learns = np.array([p.bucket in (Bucket.EDIT, keep) for p in prompts])
    y, y_extra = (np.array([p.bucket is Bucket.EDIT for p in rows], dtype=bool) for rows in (prompts, pairs))
    scores = np.zeros((settings.shuffles, len(prompts)))
    for shuffle in range(settings.shuffles):
        fold = folds_of([p.group for p in prompts], settings.folds, settings.seed + shuffle)
        for k in range(settings.folds):
            left_out = {p.group.casefold() for p, f in zip(prompts, fold, strict=True) if f == k}
            usable = np.array([not near & left_out for near in pairs.values()], dtype=bool)
            seen = learns & (fold != k)
            rows, labels = np.concatenate([x[seen], extra[usable]]), np.concatenate([y[seen], y_extra[usable]])
            scale = StandardScaler().fit(rows)
            machine = machine_of(kernel, rows.shape[1]).fit(scale.transform(rows), labels)
            scores[shuffle, fold == k] = machine.decision_function(scale.transform(x[fold == k]))
    return scores


def fitted(
    states: Mapping[str, PromptStates], rows: Sequence[Prompt], keep: Bucket, read: Read
) -> tuple[Machine, MachineShape]:
    """A machine on all rows, in float32; its columns count from 0 within what it reads."""
    layers, pooling, kernel = read
    x = features(states, rows, layers, pooling)
    scale = StandardScaler().fit(x)
    learned = machine_of(kernel, x.shape[1]).fit(scale.transform(x), [p.bucket is Bucket.EDIT for p in rows])
    if kernel == "linear":
        support, coef = learned.coef_, np.ones(1)
    else:
        support, coef = learned.support_vectors_, learned.dual_coef_[0]
    shape = MachineShape(closes_on=keep.value, kernel=kernel, n_columns=x.shape[1], n_support=len(support))
    machine = Machine(shape)
    machine.columns.copy_(torch.arange(x.shape[1]))
    for buffer, value in (
        (machine.mean, scale.mean_),
        (machine.std, scale.scale_),
        (machine.support, support),
        (machine.coef, coef),
        (machine.gamma, np.float64(1 / x.shape[1])),
        (machine.bias, learned.intercept_[0]),
    ):
        buffer.copy_(torch.as_tensor(np.asarray(value)))
    return machine, shape


def likeness(
    states: Mapping[str, PromptStates], prompts: Sequence[Prompt], layers: tuple[int, ...], pooling: str, share: float
) -> tuple[Machine, MachineShape, np.ndarray]:
    """The machine that closes on prompts unlike edit prompts and harmful keeps, and (n,) its logits for these.

    A prompt's distance is that to the nearest one of another group; `share` of the edit prompts are farther than the limit.
    """
    x = features(states, prompts, layers, pooling)
    known = np.array([p.bucket is not Bucket.BENIGN_KEEP for p in prompts])
    scale = StandardScaler().fit(x[known])
    rows = torch.from_numpy(scale.transform(x)).float()
    groups = np.array([p.group for p in prompts])
    away = torch.cdist(rows, rows[torch.from_numpy(known)])
    away[torch.from_numpy(groups[:, None] == groups[None, known])] = torch.inf
    distances = away.amin(1).numpy()
    edit = distances[[p.bucket is Bucket.EDIT for p in prompts]]
    limit = np.sort(edit)[::-1][int(share * len(edit))]
    shape = MachineShape(closes_on=UNLIKE, kernel="nearest", n_columns=x.shape[1], n_support=int(known.sum()))
    machine = Machine(shape)
    machine.columns.copy_(torch.arange(x.shape[1]))
    machine.mean.copy_(torch.from_numpy(scale.mean_))
    machine.std.copy_(torch.from_numpy(scale.scale_))
    machine.support.copy_(rows[torch.from_numpy(known)])
    machine.threshold.fill_(-float(np.nextafter(limit, np.inf, dtype=np.float32)))
    machine.slope.fill_(float(1 / max(edit.std(), 1e-6)))
    return machine, shape, float(machine.slope) * (-distances - float(machine.threshold))


class RbfMachine:
    """An RBF support vector machine whose kernel is made by one matrix product: 14 times as fast as libsvm, row by row
    (1500 rows of 3456 columns), for n² float64 in memory. Attributes after `fit` as in sklearn."""

    def __init__(self, gamma: float):
        self.gamma = gamma

    def fit(self, x: np.ndarray, labels: Sequence[bool] | np.ndarray) -> RbfMachine:
        self._x = np.asarray(x, np.float64)
        svc = SVC(C=C_RBF, kernel="precomputed", class_weight="balanced")
        self._svc = svc.fit(rbf_kernel(self._x, gamma=self.gamma), labels)
        self.support_vectors_ = self._x[svc.support_]
        self.dual_coef_, self.intercept_ = svc.dual_coef_, svc.intercept_
        return self

    def decision_function(self, x: np.ndarray) -> np.ndarray:
        return self._svc.decision_function(rbf_kernel(np.asarray(x, np.float64), self._x, gamma=self.gamma))


def machine_of(kernel: Kernel, n_columns: int) -> RbfMachine | LogisticRegression:
    if kernel == "linear":
        return LogisticRegression(C=C_LINEAR, max_iter=500, class_weight="balanced")
    return RbfMachine(1 / n_columns)


def features(
    states: Mapping[str, PromptStates], prompts: Sequence[Prompt], layers: Sequence[int], pooling: str
) -> np.ndarray:
    """(n, n_features) float32, laid out as the router reads them; (0, ...) without prompts fits beside any."""
    if not prompts:
        some = next(iter(states.values()))
        return np.zeros((0, len(some.features(layers, pooling))), np.float32)
    return torch.stack([states[p.id].features(layers, pooling) for p in prompts]).cpu().numpy()


def rows_for(prompts: Sequence[Prompt], keep: Bucket) -> list[Prompt]:
    return [p for p in prompts if p.bucket in (Bucket.EDIT, keep)]


def folds_of(groups: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """(n,) fold of each row; rows of one group share it."""
    names = sorted(set(groups))
    order = np.random.default_rng(seed).permutation(len(names)) % folds
    place = dict(zip(names, order, strict=True))
    return np.array([place[g] for g in groups])


def threshold_at(keep_scores: np.ndarray, share: float) -> float:
    """The lowest threshold that no more than `share` of these scores exceed."""
    ranked = np.sort(keep_scores.ravel())[::-1]
    return float(ranked[int(share * len(ranked))])


def slope_of(edit_scores: np.ndarray, keep_scores: np.ndarray) -> float:
    """Scores to log odds (Platt), for a gate that is read as a probability; the threshold stays where it is."""
    values = np.concatenate([edit_scores.ravel(), keep_scores.ravel()])[:, None]
    labels = np.concatenate([np.ones(edit_scores.size), np.zeros(keep_scores.size)])
    slope = LogisticRegression(C=1e6, class_weight="balanced").fit(values, labels).coef_[0, 0]
    return float(max(slope, 1e-3))  # machines that know nothing still open on high scores


def check_groups(prompts: Sequence[Prompt], folds: int) -> None:
    """raises ValueError where a bucket has fewer groups than folds"""
    for bucket in Bucket:
        groups = {p.group for p in prompts if p.bucket is bucket}
        if len(groups) < folds:
            raise ValueError(
                f"{len(groups)} groups of {bucket.value} prompts are too few for {folds} folds. "
                "Give more prompts, or ask for fewer folds."
            )
