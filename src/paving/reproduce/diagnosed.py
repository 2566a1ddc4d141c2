"""What the tables take from diagnostics.json, where every part is optional: one place that knows its fields."""

from __future__ import annotations

from dataclasses import dataclass

from paving.evaluation.diagnostics.records import Diagnostics, ProbeRecord, Spread, TrajectoryRecord
from paving.evaluation.results import Rate
from paving.prompts.types import Bucket
from paving.reproduce.runs import Run

LOW = "low"  # of the veto's tied thresholds


@dataclass(frozen=True)
class BasePath:
    """Along the base's own continuation under the deployed gate: RMS deviation, and nats per token added."""

    rms: Spread
    nll_delta: Spread


@dataclass(frozen=True)
class LowVeto:
    """The veto at the lower of its tied thresholds, on held-out prompts. Keys are bucket values.

    strength  mean gate times scale with it, None without prompts
    """

    accuracy: Rate
    vetoed: dict[str, Rate]
    strength: dict[str, float | None]


def lacking(run: Run, part: str) -> str:
    """Why a run has nothing of a part, and what makes it."""
    if run.diagnostics is None:
        return f"{run.name} has no diagnostics.json. Make it: paving diagnose {run.folder}"
    return f"diagnostics.json of {run.name} does not hold {part}. Make it: paving diagnose {run.folder}"


def trajectory_of(run: Run) -> TrajectoryRecord | None:
    return run.diagnostics.trajectory if run.diagnostics else None


def base_path(found: TrajectoryRecord, bucket: Bucket) -> BasePath | None:
    path = found.paths.get(bucket)
    return None if path is None else BasePath(path.path_rms, path.nll_delta)


def probes_of(found: Diagnostics) -> list[ProbeRecord]:
    return found.probes.layers if found.probes else []


def low_veto(run: Run) -> LowVeto | None:
    route = run.diagnostics.route if run.diagnostics else None
    if route is None:
        return None
    point = next((v for v in route.vetoes if v.name.startswith(LOW)), None)
    view = next((r for r in route.routes if r.vetoed is not None and r.name.endswith(LOW)), None)
    if point is None or view is None:
        return None
    return LowVeto(accuracy=point.accuracy, vetoed=point.vetoed, strength=view.strength)
