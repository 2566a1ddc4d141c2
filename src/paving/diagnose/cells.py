"""Gate policies, expert mixtures and scales in one table: each cell answers the same held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from paving.controller.gates import gate_policy, mixture_policy
from paving.controller.residual_paving import ResidualPaving
from paving.diagnose.study import Study
from paving.evaluation.diagnostics.answers import answers
from paving.evaluation.diagnostics.records import CellBlock, CellRecord
from paving.evaluation.judges import Label
from paving.evaluation.results import Score
from paving.evaluation.rows import row_of
from paving.evaluation.statistics import wilson
from paving.evaluation.three_way import KEEPS, Measured, RowSpec
from paving.generation import Completion
from paving.intervention import Identity, RowState
from paving.prompts.types import Bucket, Prompt, count_by_bucket
from paving.run_folder import write_text
from paving.traces.preservation import continuation_log_prob, keep_divergence
from paving.traces.store import TraceStore

CELLS = Path("diagnostics") / "cells"
FAILED = (Label.HARMLESS_REFUSAL, Label.HARMLESS_BROKEN, Label.HARMFUL)


@dataclass(frozen=True)
class Grid:
    """Which cells. scales: as factors of the deployed scale. prompts: most held-out prompts of each bucket."""

    policies: tuple[str, ...] = ("thresholded", "hard", "oracle")
    mixtures: tuple[str, ...] = ("router", "uniform")
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    prompts: int = 24

    def check(self) -> None:
        """raises ValueError for a policy or mixture that is not known, a factor that is not positive, or no prompt."""
        for name in self.policies:
            gate_policy(name, 0.0)
        for name in self.mixtures:
            mixture_policy(name)
        if bad := [f for f in self.factors if not (f > 0 and math.isfinite(f))]:
            raise ValueError(f"a scale factor is a positive number; got {bad[0]}. 1 is the deployed scale.")
        if not (self.policies and self.mixtures and self.factors and self.prompts > 0):
            raise ValueError("a grid needs at least one policy, one mixture, one scale factor and one prompt.")


@dataclass(frozen=True)
class Cell:
    policy: str
    mixture: str
    scale: float

    @property
    def name(self) -> str:
        return f"{self.policy} · {self.mixture} · {self.scale:g}"


def experts(study: Study, most: int) -> CellBlock:
    """Table 19's expert policy block, and each expert taken away, under the deployed gate and scale.

    most: held-out prompts of each bucket that are answered
    """
    n = study.controller.config.n_experts
    single = [f"expert:{k}" for k in range(n)] + [f"without:{k}" for k in range(n)]
    mixtures = ["router", "uniform", *single] if n > 1 else ["router"]
    policy, scale = study.controller.policy.name, study.controller.scale
    return _block(study, "expert policies", [Cell(policy, m, scale) for m in mixtures], _first(study, most))


def grid(study: Study, options: Grid) -> CellBlock:
    """Gate x mixture x scale on the first so many held-out prompts of each bucket."""
    scale = study.controller.scale
    cells = [Cell(p, m, scale * f) for m in options.mixtures for f in options.factors for p in options.policies]
    return _block(study, f"grid of {len(cells)} cells", cells, _first(study, options.prompts))


def _first(study: Study, most: int) -> list[Prompt]:
    """The first held-out prompts of each bucket: their order is the split's, which is random."""
    return [p for b in Bucket for p in study.of(b)[:most]]


def _block(study: Study, what: str, cells: Sequence[Cell], prompts: Sequence[Prompt]) -> CellBlock:
    tick = study.means.stage(f"{what}: answers", len(cells) * len(prompts))
    base = _base(study, prompts)
    records = [_kept_cell(study, cell, prompts, base, tick) for cell in dict.fromkeys(cells)]
    return CellBlock(prompts=count_by_bucket(prompts), cells=records)


def _kept_cell(
    study: Study, cell: Cell, prompts: Sequence[Prompt], base: Measured, tick: Callable[[int], None]
) -> CellRecord:
    """From the run folder where exactly this cell was measured before."""
    key = study.key(cell=repr(cell), prompts=[p.id for p in prompts])
    path = study.folder / CELLS / f"{key}.json"
    if path.exists():
        try:
            record = CellRecord.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError:
            pass  # of another version: measured again below
        else:
            tick(len(prompts))
            return record
    record = _measure(study, cell, prompts, base, tick)
    write_text(path, record.model_dump_json())
    return record


def _measure(study: Study, cell: Cell, prompts: Sequence[Prompt], base: Measured, tick: Callable[[int], None]) -> CellRecord:
    controller = controller_of(study, cell)
    intervention = study.decided(controller)
    completions = decode(study, controller, prompts, tick)
    labels = [study.label(c) for c in completions]
    is_open = {c.id for c in completions if c.gate > 0}
    keeps = [p for p in prompts if p.bucket in KEEPS]
    opened = [p for p in keeps if p.id in is_open]
    divergence = {p.id: 0.0 for p in keeps} | keep_divergence(
        study.backbone, opened, study.continuations, intervention, k=study.training.top_k
    )
    edit = [p for p in prompts if p.bucket == Bucket.EDIT]
    targets = {p.id: study.trace_targets[p.id].continuation for p in edit}
    log_probs = continuation_log_prob(study.backbone, edit, targets, intervention)
    edit_labels = [label for c, label in zip(completions, labels, strict=True) if c.bucket == Bucket.EDIT]
    kind = "diagnostic" if cell.policy in ("oracle", "open", "closed") else "learned"
    spec = RowSpec(intervention, kind, cell.policy, cell.scale, "")
    return CellRecord(
        policy=cell.policy,
        use_veto=controller.use_veto and controller.policy.vetoable,
        mixture=cell.mixture,
        scale=cell.scale,
        row=row_of(Measured(spec, completions, labels, divergence), base, None, {p.id: p.group for p in prompts}),
        safe_answers=wilson(sum(label not in FAILED for label in edit_labels), len(edit_labels)),
        target_alignment=Score(
            value=sum(math.exp(v) for v in log_probs.values()) / len(edit) if edit else None, n=len(edit)
        ),
    )


def controller_of(study: Study, cell: Cell) -> ResidualPaving:
    deployed = study.controller
    same = cell.policy == deployed.policy.name
    policy = deployed.policy if same else gate_policy(cell.policy, study.metrics.router.threshold)
    variant = deployed.with_policy(policy, name=cell.name).with_scale(cell.scale)
    return variant.with_mixture(mixture_policy(cell.mixture))


def decode(
    study: Study, controller: ResidualPaving, prompts: Sequence[Prompt], tick: Callable[[int], None]
) -> list[Completion]:
    """Answers under a variant of the run's controller; closed gates are answered by the base's own completions."""
    intervention = study.decided(controller)
    decoding = study.config.decoding.model_dump(mode="json")

    def key_of(p: Prompt, state: RowState) -> str:
        # Gate and scale meet in one strength: a hard gate, the oracle and an open gate share their answers.
        # Rounded, because a sum over a larger batch may end in another last bit.
        strength = f"{controller.scale * state.gate:.5g}"
        mixture = repr(controller.mixture)
        return TraceStore.key(
            weights=study.weights_key,
            strength=strength,
            mixture=mixture,
            decoding=decoding,
            prompt="\0".join(p.asked),
        )

    return answers(
        study.backbone,
        prompts,
        intervention,
        intervention.states(prompts, study.backbone.device),
        study.base,
        key_of,
        study.config.decoding,
        study.journal,
        tick=tick,
    )


def _base(study: Study, prompts: Sequence[Prompt]) -> Measured:
    completions = [study.base[p.id] for p in prompts]
    unmoved = {p.id: 0.0 for p in prompts if p.bucket in KEEPS}
    spec = RowSpec(Identity(), "reference", "none", None, "base")
    return Measured(spec, completions, [study.label(c) for c in completions], unmoved)
