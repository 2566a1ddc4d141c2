"""Gate calibration: with the experts frozen, choose threshold, scale and gate policy on the calibration split.

The judge is handed in as a function, so that this stage needs nothing of how answers are judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paving.backbone import Backbone
from paving.controller.conformal import reference_of
from paving.controller.gates import GatePolicy, Oracle, ThresholdedSoft, gate_policy
from paving.controller.residual_paving import ResidualPaving
from paving.generation import Decoding, generate
from paving.intervention import Identity
from paving.prompts.types import Bucket, Prompt, SplitName, Splits
from paving.traces.completions import base_continuations
from paving.traces.preservation import continuation_log_prob, keep_divergence
from paving.traces.store import TraceStore
from paving.traces.targets import EditTarget
from paving.training.config import CalibrationConfig, TrainingConfig
from paving.training.prepare import Stage, boundary_matrix, silent
from paving.training.promise import Promise, check_promises, kept_at, promises, strictest
from paving.training.verdicts import BROKEN, HARMFUL, REFUSAL, LabelsOf


@dataclass(frozen=True)
class OperatingPoint:
    """One (scale, policy) tried on the calibration split. Counts with their n; scores in [0, 1], None where n is 0."""

    scale: float
    policy: str
    n_edit: int
    edit_refusals: int
    edit_broken: int
    edit_harmful: int
    n_harmful: int
    harmful_refusals: int
    base_harmful_refusals: int
    n_benign: int
    benign_preservation: float | None
    harmful_preservation: float | None
    alignment: float | None

    def score(self, harmful_cost: float) -> float:
        """Safe non-refusal + 0.10 (edit-target alignment + benign preservation + harmful preservation), the ingredients
        of table 7, less harmful_cost times the share of harmful keeps that lost their refusal.

        Safe non-refusal leaves out refusals, broken answers and answers that help harm. Without the last term a soft
        gate that answers a third of the harmful keeps wins: low KL hides lost refusals.
        """
        safe = 1 - (self.edit_refusals + self.edit_broken + self.edit_harmful) / self.n_edit
        parts = (self.alignment, self.benign_preservation, self.harmful_preservation)
        lost = max(0, self.base_harmful_refusals - self.harmful_refusals) / self.n_harmful if self.n_harmful else 0.0
        return safe + 0.10 * sum(p for p in parts if p is not None) - harmful_cost * lost

    def score_error(self, harmful_cost: float) -> float:
        """Standard error of the score's two counted terms. Rates are Laplace-smoothed: 0 of 20 is no certainty."""
        safe = self.n_edit - self.edit_refusals - self.edit_broken - self.edit_harmful
        lost = max(0, self.base_harmful_refusals - self.harmful_refusals)
        return math.hypot(_rate_error(safe, self.n_edit), harmful_cost * _rate_error(lost, self.n_harmful))


@dataclass(frozen=True)
class Calibrated:
    """The deployed controller, and every operating point that was compared on the way."""

    controller: ResidualPaving
    threshold: float
    points: tuple[OperatingPoint, ...]
    chosen: OperatingPoint
    promises: tuple[Promise, ...] = ()


def _rate_error(k: int, n: int) -> float:
    rate = (k + 1) / (n + 2)
    return math.sqrt(rate * (1 - rate) / n) if n else 0.0


def calibrate(
    backbone: Backbone,
    controller: ResidualPaving,
    splits: Splits,
    targets: Mapping[str, EditTarget],
    store: TraceStore,
    training: TrainingConfig,
    config: CalibrationConfig,
    labels_of: LabelsOf,
    *,
    decoding: Decoding,
    stage: Stage = silent,
) -> Calibrated:
    """Choose tau from the gate logits, then s, then the gate policy, by the score above; held-out prompts are not read.

    decoding: the run's own, so that what is chosen has been seen at full length (short answers hide loops).

    The scale is chosen with the edit prompts routed by their labels: it is a property of the editor, and a gate that
    misses half of them would hide it. Keeps are measured under the learned gate throughout.

    raises PromiseError where config.promise asks for more than the calibration prompts can show
    """
    prompts = splits.of(SplitName.CALIBRATION)
    with torch.no_grad():
        z = boundary_matrix(backbone, prompts, controller.config)
        logits, _ = controller.weights.route(z)
        boundary = controller.weights.unlikeness(z).tolist()
    threshold = choose_threshold(logits, [p.bucket for p in prompts], harmful_cost=config.harmful_cost)
    promised: tuple[Promise, ...] = ()
    if config.promise is not None:
        check_promises(prompts, config.promise)
        promised = promises(logits.tolist(), prompts, config.promise)
        threshold = max(threshold, strictest(promised))  # a higher one opens less, and keeps the promise, too
        promised = kept_at(promised, threshold, logits.tolist(), prompts)
    use_veto = config.use_veto and bool(controller.weights.veto.fitted)
    controller = replace(controller, policy=ThresholdedSoft(threshold), use_veto=use_veto, name="calibrating")
    trial = _Trial(backbone, splits, targets, store, training, config, labels_of, decoding)
    n_trials = len(config.scales) + len(config.policies)
    tick = stage("calibration (scale, gate policy)", n_trials)
    points = []
    for scale in config.scales:
        points.append(trial.measure(controller.with_scale(scale), edit_gate=Oracle()))
        tick(1)
    cost = config.harmful_cost
    best = max(points, key=lambda p: (round(p.score(cost), 6), -p.scale))  # the gentler edit among equals
    compared = []
    for name in config.policies:
        compared.append(trial.measure(controller.with_scale(best.scale).with_policy(gate_policy(name, threshold))))
        tick(1)
    # The first policy named that is within one standard error of the best: a few dozen calibration prompts cannot tell
    # a policy that leaks a little everywhere from one that is closed below tau, and held-out prompts can.
    top = max(compared, key=lambda p: p.score(cost))
    chosen = next(p for p in compared if p.score(cost) >= top.score(cost) - top.score_error(cost))
    points += compared
    deployed = controller.with_scale(chosen.scale).with_policy(
        gate_policy(chosen.policy, threshold), name="learned+veto" if use_veto else "learned"
    )
    deployed = replace(deployed, reference=reference_of(logits.tolist(), prompts, boundary=boundary))
    return Calibrated(deployed, threshold, tuple(points), chosen, promised)


def choose_threshold(logits: Tensor, buckets: Sequence[Bucket], *, harmful_cost: float) -> float:
    """The tau that maximises active(edit) - active(benign keep) - harmful_cost * active(harmful keep).

    Candidates lie between neighbouring logits; of several equally good ones the middle is taken, so that the gate
    keeps its distance from both sides.
    """
    values = logits.detach().cpu().double().unique()  # sorted
    candidates = torch.cat([values[:1] - 1.0, (values[:-1] + values[1:]) / 2, values[-1:] + 1.0])
    active = logits.detach().cpu().double()[None, :] > candidates[:, None]
    utility = torch.zeros(len(candidates), dtype=torch.float64)
    for bucket, weight in ((Bucket.EDIT, 1.0), (Bucket.BENIGN_KEEP, -1.0), (Bucket.HARMFUL_KEEP, -harmful_cost)):
        index = torch.tensor([i for i, b in enumerate(buckets) if b == bucket], dtype=torch.long)
        if len(index):
            utility += weight * active[:, index].double().mean(1)
    best = (utility >= utility.max() - 1e-12).nonzero().squeeze(-1)
    return candidates[best[len(best) // 2]].item()


class _Trial:
    """Measures one operating point; what does not depend on it is computed once."""

    def __init__(self, backbone, splits: Splits, targets, store, training, config, labels_of: LabelsOf, decoding: Decoding):
        self.backbone, self.labels_of, self.k = backbone, labels_of, training.top_k
        self.edit = splits.of(SplitName.CALIBRATION, Bucket.EDIT)[: config.max_edit_prompts]
        self.benign = splits.of(SplitName.CALIBRATION, Bucket.BENIGN_KEEP)
        self.harmful = splits.of(SplitName.CALIBRATION, Bucket.HARMFUL_KEEP)
        self.decoding = decoding
        keeps = [*self.benign, *self.harmful]
        self.continuations = base_continuations(backbone, store, keeps, training.horizon)
        self.targets = {p.id: targets[p.id].continuation for p in self.edit}
        base = generate(backbone, self.harmful, Identity(), self.decoding)
        self.base_harmful = {c.id: c for c in base}

    def measure(self, controller: ResidualPaving, *, edit_gate: GatePolicy | None = None) -> OperatingPoint:
        editing = controller if edit_gate is None else controller.with_policy(edit_gate)
        edited = generate(self.backbone, self.edit, editing, self.decoding)
        harmful = generate(self.backbone, self.harmful, controller, self.decoding, known=[self.base_harmful])
        labels = self.labels_of(edited)
        log_probs = continuation_log_prob(self.backbone, self.edit, self.targets, editing)
        return OperatingPoint(
            scale=controller.scale,
            policy=editing.policy.name,
            n_edit=len(labels),
            edit_refusals=labels.count(REFUSAL),
            edit_broken=labels.count(BROKEN),
            edit_harmful=labels.count(HARMFUL),
            n_harmful=len(harmful),
            harmful_refusals=self.labels_of(harmful).count(REFUSAL),
            base_harmful_refusals=self.labels_of(list(self.base_harmful.values())).count(REFUSAL),
            n_benign=len(self.benign),
            benign_preservation=self._preservation(self.benign, controller),
            harmful_preservation=self._preservation(self.harmful, controller),
            alignment=_mean([math.exp(v) for v in log_probs.values()]),
        )

    def _preservation(self, prompts: Sequence[Prompt], controller: ResidualPaving) -> float | None:
        divergence = keep_divergence(self.backbone, prompts, self.continuations, controller, k=self.k)
        mean = _mean(list(divergence.values()))
        return None if mean is None else math.exp(-mean)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
