"""How the measurements of `paving diagnose` become the records of `diagnostics.json`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from paving.evaluation.diagnostics.base_path import BasePath, relative_size, stream_size
from paving.evaluation.diagnostics.corruption import CorruptionPoint, conclusion
from paving.evaluation.diagnostics.lateness import LateRefusals
from paving.evaluation.diagnostics.records import (
    BandRecord,
    CorruptionCurve,
    CorruptionRecord,
    LateRecord,
    LayerAlignment,
    LayerNorm,
    PathRecord,
    ProbeRecord,
    RouteRecord,
    Spread,
    StepAlignment,
    TrajectoryRecord,
    VetoRecord,
)
from paving.evaluation.diagnostics.route_calibration import RouteView, VetoPoint
from paving.evaluation.diagnostics.separability import LayerProbe
from paving.evaluation.diagnostics.trajectory import Alignment
from paving.evaluation.results import Rate


def corruption_curve(points: Sequence[CorruptionPoint]) -> CorruptionCurve:
    def band(b) -> BandRecord:
        return BandRecord(mean=b.mean, low=b.low, high=b.high)

    records = [
        CorruptionRecord(
            rate=p.rate,
            edit_refusal=band(p.edit_refusal),
            benign_refusal=band(p.benign_refusal),
            harmful_refusal=band(p.harmful_refusal),
            benign_preservation=band(p.benign_preservation),
            harmful_preservation=band(p.harmful_preservation),
        )
        for p in points
    ]
    return CorruptionCurve(points=records, conclusion=conclusion(points))


def probe_records(probes: Sequence[LayerProbe]) -> list[ProbeRecord]:
    return [ProbeRecord(layer=p.layer, edit_vs_harmful=p.edit_vs_harmful, edit_vs_benign=p.edit_vs_benign) for p in probes]


def late_records(row: str, bucket: str, found: Sequence[LateRefusals]) -> list[LateRecord]:
    return [LateRecord(row=row, bucket=bucket, length=f.length, share=f.share, n_long=f.n_long) for f in found]


def route_records(views: Sequence[RouteView]) -> list[RouteRecord]:
    return [RouteRecord(**vars(v)) for v in views]


def veto_records(points: Sequence[VetoPoint]) -> list[VetoRecord]:
    return [VetoRecord(**vars(p)) for p in points]


def trajectory_record(
    policy: str,
    moved: Sequence[Alignment],
    *,
    n_closed: int,
    n_short: int,
    layers: Sequence[int],
    paths: Mapping[str, PathRecord],
) -> TrajectoryRecord:
    """moved: edit prompts whose gate opened; n_closed and n_short count those that were left out."""
    longest = max((a.edit.shape[1] for a in moved), default=0)

    def at_step(name: str, step: int) -> np.ndarray:
        return np.concatenate([getattr(a, name)[:, step] for a in moved if a.edit.shape[1] > step] or [np.zeros(0)])

    nll_base, nll_edited = [a.nll_base for a in moved], [a.nll_edited for a in moved]
    return TrajectoryRecord(
        policy=policy,
        n_closed=n_closed,
        n_short=n_short,
        edit=spread([a.edit_whole for a in moved]),
        refusal=spread([a.refusal_whole for a in moved]),
        gap=spread([a.edit_whole - a.refusal_whole for a in moved]),
        layers=[
            LayerAlignment(
                layer=layer,
                edit=_mean(np.concatenate([a.edit[i] for a in moved] or [np.zeros(0)])),
                refusal=_mean(np.concatenate([a.refusal[i] for a in moved] or [np.zeros(0)])),
            )
            for i, layer in enumerate(layers)
        ],
        steps=[
            StepAlignment(
                step=step + 1,
                edit=_mean(at_step("edit", step)),
                refusal=_mean(at_step("refusal", step)),
                n=sum(a.edit.shape[1] > step for a in moved),
            )
            for step in range(longest)
        ],
        nll_base=spread(nll_base),
        nll_edited=spread(nll_edited),
        nll_reduction=1 - sum(nll_edited) / sum(nll_base) if nll_base and sum(nll_base) > 0 else None,
        paths=dict(paths),
    )


def path_record(opened: Collection[BasePath], n_closed: int, active: Rate, blocked: Rate | None) -> PathRecord:
    """opened: paths of the prompts whose gate opened; the n_closed others are the base's, and count as 0."""
    closed = [0.0] * n_closed
    return PathRecord(
        active=active,
        blocked=blocked,
        path_rms=spread([p.rms for p in opened] + closed),
        nll_delta=spread([p.nll_edited - p.nll_base for p in opened] + closed),
    )


def layer_norms(
    bucket: str, layers: Sequence[int], opened: Collection[BasePath], deployed: Collection[BasePath]
) -> list[LayerNorm]:
    """One record a layer, of one bucket's paths under an open gate and under the deployed one."""
    if not opened:
        return [
            LayerNorm(layer=layer, bucket=bucket, base=None, edited=None, share_open=None, share_deployed=None)
            for layer in layers
        ]
    columns = zip(
        layers,
        stream_size([p.base for p in opened]).tolist(),
        stream_size([p.edited for p in opened]).tolist(),
        relative_size(opened).tolist(),
        relative_size(deployed).tolist(),
        strict=True,
    )
    return [
        LayerNorm(layer=layer, bucket=bucket, base=base, edited=edited, share_open=share, share_deployed=as_deployed)
        for layer, base, edited, share, as_deployed in columns
    ]


def spread(values: Sequence[float]) -> Spread:
    known = [v for v in values if not np.isnan(v)]
    return Spread(
        mean=float(np.mean(known)) if known else None,
        sd=float(np.std(known, ddof=1)) if len(known) > 1 else None,
        n=len(known),
    )


def _mean(values: np.ndarray) -> float | None:
    """Mean over what has a value; nan marks a displacement without a direction."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
