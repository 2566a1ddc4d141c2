"""What `diagnostics.json` holds, and how the measurements become it. Missing is None, never 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from paving.evaluation.diagnostics.corruption import CorruptionPoint, conclusion
from paving.evaluation.diagnostics.lateness import LateRefusals
from paving.evaluation.diagnostics.separability import LayerProbe
from paving.evaluation.diagnostics.trajectory import Alignment
from paving.evaluation.results import Rate, Record, Score


class BandRecord(Record):
    mean: float | None
    low: float | None
    high: float | None


class CorruptionRecord(Record):
    """One flip rate; fractions, with 95 % bands over random flips."""

    rate: float
    edit_refusal: BandRecord
    benign_refusal: BandRecord
    harmful_refusal: BandRecord
    benign_preservation: BandRecord
    harmful_preservation: BandRecord


class Spread(Record):
    """Mean and standard deviation (n - 1) over n prompts; None for n = 0, and no deviation for n = 1."""

    mean: float | None
    sd: float | None
    n: int


class LayerAlignment(Record):
    """Mean cosine at one layer, over steps and prompts."""

    layer: int
    edit: float | None
    refusal: float | None


class StepAlignment(Record):
    """Mean cosine at one step of the edit target (step 0 predicts its first token), over layers and prompts."""

    step: int
    edit: float | None
    refusal: float | None
    n: int


class TrajectoryRecord(Record):
    """Residual Paving, A.6 and table 4, on held-out edit prompts whose gate opened. Cosines in [-1, 1], NLL in nats.

    n_closed       edit prompts left out because their gate stayed closed: nothing moved
    nll_reduction  1 - mean NLL of the edit target under the edit / without it
    path_rms       bucket -> RMS deviation from the base's own path; closed gates count as the 0 they are
    """

    policy: str
    n_closed: int
    edit: Spread
    refusal: Spread
    gap: Spread
    layers: list[LayerAlignment]
    steps: list[StepAlignment]
    nll_base: Spread
    nll_edited: Spread
    nll_reduction: float | None
    path_rms: dict[str, Score]


class ProbeRecord(Record):
    layer: int
    edit_vs_harmful: float | None
    edit_vs_benign: float | None


class LateRecord(Record):
    row: str
    bucket: str
    length: int
    share: Rate
    n_long: int


class Diagnostics(Record):
    schema_version: int = 1
    run: str
    judge: str
    corruption: list[CorruptionRecord]
    corruption_conclusion: str
    trajectory: TrajectoryRecord
    probes: list[ProbeRecord]
    probe_prompts: dict[str, int]
    late: list[LateRecord]


def corruption_records(points: Sequence[CorruptionPoint]) -> tuple[list[CorruptionRecord], str]:
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
    return records, conclusion(points)


def probe_records(probes: Sequence[LayerProbe]) -> list[ProbeRecord]:
    return [ProbeRecord(layer=p.layer, edit_vs_harmful=p.edit_vs_harmful, edit_vs_benign=p.edit_vs_benign) for p in probes]


def late_records(row: str, bucket: str, found: Sequence[LateRefusals]) -> list[LateRecord]:
    return [LateRecord(row=row, bucket=bucket, length=f.length, share=f.share, n_long=f.n_long) for f in found]


def trajectory_record(
    policy: str, found: Sequence[Alignment], layers: Sequence[int], path_rms: Mapping[str, Sequence[float]]
) -> TrajectoryRecord:
    """path_rms: bucket -> one RMS per prompt."""
    moved = [a for a in found if a.gate > 0]
    longest = max((a.edit.shape[1] for a in moved), default=0)

    def at_step(name: str, step: int) -> np.ndarray:
        return np.concatenate([getattr(a, name)[:, step] for a in moved if a.edit.shape[1] > step] or [np.zeros(0)])

    nll_base, nll_edited = [a.nll_base for a in moved], [a.nll_edited for a in moved]
    return TrajectoryRecord(
        policy=policy,
        n_closed=len(found) - len(moved),
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
        path_rms={b: Score(value=_mean(np.array(v)), n=len(v)) for b, v in path_rms.items()},
    )


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
