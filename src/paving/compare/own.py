"""Residual Paving under the rules that choose the comparators' scales: the run's own controller, at the gates it was trained
with and behind the comparators' probe, over scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from paving.backbone import Backbone, PromptBatch
from paving.compare.bench import Bench
from paving.compare.methods import SCALES
from paving.compare.sweep import OpenAnswers, all_but_broken, answers_at, figures
from paving.controller.residual_paving import ResidualPaving
from paving.evaluation.comparison import OWN, Choice, Limits, MethodRecord, SweepFigures
from paving.evaluation.three_way import RowSpec
from paving.intervention import Applied
from paving.prompts.types import Bucket
from paving.run_rows import row_specs
from paving.steering.steered import Routing

PROBE = "probe"
NOTE = "its own row is at the scale that was chosen when it was trained"


@dataclass(frozen=True)
class Given:
    """The gates of one batch, decided elsewhere."""

    gates: tuple[float, ...]
    name: str = "given"
    vetoable: bool = False

    def gate(self, logits: Tensor, batch: PromptBatch) -> Tensor:
        return torch.tensor(self.gates, device=logits.device)


@dataclass(frozen=True)
class BehindProbe:
    """The run's experts where another routing opens: what its editor does, and what its gate.

    routing: asked for when a prompt is there to be routed; a probe takes its time to be fitted
    """

    name: str
    controller: ResidualPaving
    routing: Callable[[], Routing]

    @contextmanager
    def apply(self, backbone: Backbone, batch: PromptBatch) -> Iterator[Applied]:
        gates = tuple(state.gate for state in self.routing().route(backbone, batch))
        with self.controller.with_policy(Given(gates), use_veto=False).apply(backbone, batch) as applied:
            yield applied


def own_variants(bench: Bench) -> tuple[str, ...]:
    """The deployed row, the same experts behind the probe that comparators have, and the oracle: what the editor does where
    the gate is right."""
    return ("learned+veto" if bench.controller.use_veto else "learned", PROBE, "oracle")


def own_spec(bench: Bench, variant: str, scale: float) -> RowSpec:
    name = f"{OWN}@{scale:g}_{variant}"
    specs = row_specs(bench.controller.with_scale(scale), (), bench.folder)
    if variant == PROBE:
        like = next(s for s in specs if s.intervention.name == "oracle")
        behind = BehindProbe(name, bench.controller.with_scale(scale), partial(bench.routing, PROBE))
        return replace(like, intervention=behind, policy=PROBE, key=f"{like.editor}/{bench.routing_key(PROBE)}")
    spec = next(s for s in specs if s.intervention.name == variant)
    return replace(spec, intervention=replace(spec.intervention, name=name))


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
