"""Residual Paving under the rules that choose the comparators' scales: the run's own controller, at the gates it was trained
with, over scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from paving.compare.bench import Bench
from paving.compare.methods import SCALES
from paving.compare.sweep import OpenAnswers, all_but_broken, answers_at, figures
from paving.evaluation.comparison import OWN, Choice, Limits, MethodRecord, SweepFigures
from paving.evaluation.three_way import RowSpec
from paving.prompts.types import Bucket
from paving.run_rows import row_specs

NOTE = "its own row is at the scale that was chosen when it was trained"


def own_variants(bench: Bench) -> tuple[str, ...]:
    """The deployed row, and the oracle: what the editor does where the gate is right."""
    return ("learned+veto" if bench.controller.use_veto else "learned", "oracle")


def own_spec(bench: Bench, variant: str, scale: float) -> RowSpec:
    specs = row_specs(bench.controller.with_scale(scale), (), bench.folder)
    spec = next(s for s in specs if s.intervention.name == variant)
    return replace(spec, intervention=replace(spec.intervention, name=f"{OWN}@{scale:g}_{variant}"))


def own_record(points: Sequence[SweepFigures], scale: float) -> MethodRecord:
    """scale: the run's own"""
    tried = sorted({p.scale for p in points if p.method == OWN})
    left_out = sorted({*SCALES, scale} - set(tried))
    return MethodRecord(name=OWN, note=NOTE, scales=tried, left_out=left_out)


def own_points(bench: Bench, limits: Limits) -> list[SweepFigures]:
    """Figures on the calibration split. Answers are decoded under the gates, which may be soft."""
    prompts = [p for b in Bucket for p in bench.calibration[b]]
    everywhere = {p.id: True for p in prompts}  # what the gates closed is the base's in these answers already
    points = []
    for variant in own_variants(bench):

        def at(scale: float, variant: str = variant) -> OpenAnswers:
            spec = own_spec(bench, variant, scale)
            return answers_at(bench, spec.intervention.name, OWN, scale, spec.intervention, spec.key, lambda: NOTE)

        scales = sorted({*SCALES, bench.controller.scale})
        for answers in all_but_broken(bench, scales, at):
            points.append(figures(answers, variant, everywhere, bench.base_labels, bench.calibration, limits))
    return points


@dataclass(frozen=True)
class OwnChosen:
    """One held-out row of the run's own controller, at a scale that a rule took and that is not its own."""

    bench: Bench
    variant: str
    scale: float
    rules: tuple[str, ...]
    name: str = OWN

    def spec(self) -> RowSpec:
        return own_spec(self.bench, self.variant, self.scale)


def own_rules(chosen: Sequence[Choice]) -> dict[tuple[str, float], tuple[str, ...]]:
    """(variant, scale) -> the rules that took it."""
    found: dict[tuple[str, float], tuple[str, ...]] = {}
    for c in chosen:
        if c.method == OWN and c.scale is not None:
            found[c.variant, c.scale] = (*found.get((c.variant, c.scale), ()), f"{c.rule}/{c.objective}")
    return found
