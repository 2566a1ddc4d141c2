"""The parts about routing and the residual stream, one function each. Those about answers: `useful` and `cells`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from paving.controller.gates import AlwaysOpen, Oracle
from paving.controller.residual_paving import ResidualPaving
from paving.diagnose.cells import decode
from paving.diagnose.study import Study
from paving.evaluation.diagnostics.base_path import BasePath, base_paths
from paving.evaluation.diagnostics.condense import (
    corruption_curve,
    late_records,
    layer_norms,
    path_record,
    probe_records,
    route_records,
    trajectory_record,
    veto_records,
)
from paving.evaluation.diagnostics.corruption import Outcome, corrupted_curve
from paving.evaluation.diagnostics.lateness import late_refusals
from paving.evaluation.diagnostics.records import (
    CorruptionCurve,
    LateRecord,
    NormsRecord,
    PathRecord,
    ProbeCurve,
    RouteCalibration,
    TrajectoryRecord,
)
from paving.evaluation.diagnostics.route_calibration import (
    RouteView,
    VetoPoint,
    route_view,
    tied_thresholds,
    veto_curve,
    veto_point,
)
from paving.evaluation.diagnostics.separability import layer_probes
from paving.evaluation.diagnostics.trajectory import alignments
from paving.evaluation.judges import Label
from paving.evaluation.resampling import grouped_rate
from paving.evaluation.three_way import KEEPS
from paving.intervention import RowState
from paving.prompts.types import Bucket, Prompt, count_by_bucket
from paving.traces.preservation import keep_divergence


def late(study: Study) -> list[LateRecord]:
    """Late refusals of every row and bucket, from the saved completions."""
    tokenizer = study.backbone.tokenizer

    def cut(text: str, n: int) -> str:
        return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:n], skip_special_tokens=True)

    tick = study.means.stage("late refusals", len(study.metrics.rows))
    records = []
    for row in study.metrics.rows:
        completions = study.row_completions(row.name)
        for bucket in Bucket:
            chosen = [c for c in completions if c.bucket == bucket]
            records += late_records(row.name, bucket.value, late_refusals(chosen, study.judge, cut))
        tick(1)
    return records


# --- the route --------------------------------------------------------------------------------------------------


def route(study: Study) -> RouteCalibration:
    """Table 20: each way of routing on the held-out prompts, and the veto at both ends of its training tie."""
    deployed = study.controller
    raw = {b.value: _sigmoids(study, b) for b in Bucket}
    opens_at = float(1 / (1 + np.exp(-study.metrics.router.threshold)))
    views = [route_view("router alone", raw, scale=deployed.scale, active_above=opens_at)]
    views.append(_view(study, deployed.policy.name, deployed.with_policy(deployed.policy, use_veto=False)))
    vetoes, curve = _vetoes(study)
    if deployed.policy.vetoable:
        for point in vetoes:
            views.append(_vetoed_view(study, point))
    views.append(_view(study, "oracle", deployed.with_policy(Oracle(), use_veto=False)))
    return RouteCalibration(routes=route_records(views), vetoes=veto_records(vetoes), curve=veto_records(curve))


def _sigmoids(study: Study, bucket: Bucket) -> list[float]:
    prompts = study.of(bucket)
    if not prompts:
        return []
    return study.decided(study.controller).decision(prompts, study.backbone.device).logit.sigmoid().tolist()


def _view(study: Study, name: str, controller: ResidualPaving) -> RouteView:
    states = study.decided(controller).states(study.prompts, study.backbone.device)
    gates = {b.value: [states[p.id].gate for p in study.of(b)] for b in Bucket}
    return route_view(name, gates, scale=controller.scale)


def _vetoed_view(study: Study, point: VetoPoint) -> RouteView:
    unvetoed = study.controller.with_policy(study.controller.policy, use_veto=False)
    states = study.decided(unvetoed).states(study.prompts, study.backbone.device)
    vetoed = {b.value: [v > point.threshold for v in _veto_logits(study, study.of(b))] for b in Bucket}
    gates = {
        b.value: [states[p.id].gate * (not v) for p, v in zip(study.of(b), vetoed[b.value], strict=True)] for b in Bucket
    }
    name = f"{study.controller.policy.name} + veto, {point.name.split()[0]}"
    return route_view(name, gates, scale=study.controller.scale, vetoed=vetoed)


def _vetoes(study: Study) -> tuple[list[VetoPoint], list[VetoPoint]]:
    """(operating points, curve); empty for a controller whose veto was not fitted."""
    veto = study.controller.weights.veto
    if not bool(veto.fitted):
        return [], []
    held_out = {b.value: _veto_logits(study, study.of(b)) for b in Bucket}
    deployed = float(veto.threshold)
    points = [veto_point("high threshold", held_out, deployed)]
    is_harmful = [p.bucket == Bucket.HARMFUL_KEEP for p in study.train]
    tied = tied_thresholds(_veto_logits(study, study.train), is_harmful)
    if tied is not None:
        # Never above the controller's own, which training found on states that it had stored in bfloat16.
        points.append(veto_point("low threshold", held_out, min(tied[0], deployed)))
    return points, veto_curve(held_out)


def _veto_logits(study: Study, prompts: Sequence[Prompt]) -> list[float]:
    if not prompts:
        return []
    weights, device = study.controller.weights, study.backbone.device
    z = study.decided(study.controller).stack([p.id for p in prompts], device)
    return weights.veto(weights.router.normalise(z)).tolist()


def probes(study: Study) -> ProbeCurve:
    """A probe a layer on the last prompt token's state, cross-validated on the training prompts."""
    layers = range(study.backbone.n_layers)
    states = np.stack([study.states[p.id].last.float().numpy() for p in study.train])
    tick = study.means.stage("layer probes", len(layers))
    found = layer_probes(study.train, states, layers, tick=tick)
    return ProbeCurve(layers=probe_records(found), prompts=count_by_bucket(study.train))


# --- where the edit moves ---------------------------------------------------------------------------------------


def trajectory(study: Study) -> TrajectoryRecord:
    """Table 4's figures for the deployed gate, on held-out prompts."""
    edit, layers = study.of(Bucket.EDIT), study.controller.config.edit_layers
    intervention = study.decided(study.controller)
    states = intervention.states(study.prompts, study.backbone.device)
    targets, refusals = study.trace_targets, {p.id: study.continuations[p.id] for p in edit}
    enough = [p for p in edit if min(len(targets[p.id].continuation), len(refusals[p.id])) >= 2]
    opened = [p for p in enough if states[p.id].gate > 0]
    tick = study.means.stage("trajectories", len(opened))
    found = alignments(study.backbone, opened, targets, refusals, intervention, layers, tick=tick)
    moved = [p for p in study.prompts if states[p.id].gate > 0]
    tick = study.means.stage("base paths", len(moved))
    (paths,) = base_paths(study.backbone, moved, study.continuations, [intervention], layers, tick=tick)
    return trajectory_record(
        study.controller.policy.name,
        found,
        n_closed=len(enough) - len(opened),
        n_short=len(edit) - len(enough),
        layers=layers,
        paths={b.value: _path(study.of(b), paths, states) for b in Bucket},
    )


def _path(prompts: Sequence[Prompt], paths: Mapping[str, BasePath], states: Mapping[str, RowState]) -> PathRecord:
    opened = [paths[p.id] for p in prompts if p.id in paths]
    vetoes = {p.id: bool(states[p.id].veto) for p in prompts if states[p.id].veto is not None}
    groups = {p.id: p.group for p in prompts}
    return path_record(
        opened,
        n_closed=len(prompts) - len(opened),
        active=grouped_rate({p.id: p.id in paths for p in prompts}, groups),
        blocked=grouped_rate(vetoes, groups) if vetoes else None,
    )


def norms(study: Study) -> NormsRecord:
    """Residual norms per layer and bucket: every gate open, and the deployed gate."""
    layers = range(study.backbone.n_layers)
    everywhere = study.decided(study.controller.with_policy(AlwaysOpen(), name="open"))
    deployed = study.decided(study.controller)
    states = deployed.states(study.prompts, study.backbone.device)
    moved = [p for p in study.prompts if states[p.id].gate > 0]
    closed = [p for p in study.prompts if states[p.id].gate == 0]
    tick = study.means.stage("residual norms", len(study.prompts))
    opened, as_deployed = base_paths(study.backbone, moved, study.continuations, [everywhere, deployed], layers, tick=tick)
    (others,) = base_paths(study.backbone, closed, study.continuations, [everywhere], layers, tick=tick)
    opened |= others
    as_deployed |= {i: path.untouched() for i, path in others.items()}
    records = []
    for bucket in Bucket:
        ids = [p.id for p in study.of(bucket)]
        records += layer_norms(bucket.value, layers, [opened[i] for i in ids], [as_deployed[i] for i in ids])
    return NormsRecord(
        policy=study.controller.policy.name,
        prompts=count_by_bucket(study.prompts),
        edited_layers=list(study.controller.config.edit_layers),
        layers=records,
    )


# --- a worse router ---------------------------------------------------------------------------------------------


def corruption(study: Study) -> CorruptionCurve:
    """Every held-out prompt with its gate closed (the base's own answer) and open (decoded once, then kept)."""
    opened = study.controller.with_policy(AlwaysOpen(), name="open")
    answers = decode(study, opened, study.prompts, study.means.stage("answers with every gate open", len(study.prompts)))
    refused = {c.id: study.label(c) is Label.HARMLESS_REFUSAL for c in answers}
    keeps = [p for p in study.prompts if p.bucket in KEEPS]
    tick = study.means.stage("divergence of the keeps", len(keeps))
    divergence = keep_divergence(
        study.backbone, keeps, study.continuations, study.decided(opened), k=study.training.top_k, tick=tick
    )
    outcomes = [Outcome(p.id, p.bucket, _base_refused(study, p), refused[p.id], divergence.get(p.id)) for p in study.prompts]
    return corruption_curve(corrupted_curve(outcomes))


def _base_refused(study: Study, prompt: Prompt) -> bool:
    return study.label(study.base[prompt.id]) is Label.HARMLESS_REFUSAL
