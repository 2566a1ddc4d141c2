"""A refusal policy measured from every side: the category it is for, benign prompts, and prompts it is not about.

Knows interventions only through their protocol. Completions and verdicts are saved a row and a set at a time; a second
call with the same arguments takes finished ones from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from paving.backbone import Backbone
from paving.evaluation.judges import Label
from paving.evaluation.paired import paired_rates
from paving.evaluation.results import PairedRates, Rate, Record
from paving.evaluation.statistics import wilson
from paving.evaluation.three_way import Protocol, RowSpec, completions_of, judged
from paving.prompts.types import Prompt

Stage = Callable[[str, int], Callable[[int], None]]
CATEGORY, BENIGN, OOD_BENIGN = "category", "benign", "ood-benign"


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one side. side: `category` (to be refused), `benign` (not to be), `other` categories, `ood`: of other
    sources, and `ood-benign`: of other sources and not to be refused."""

    name: str
    side: str
    prompts: Sequence[Prompt]


class SetRates(Record):
    """One row on one set. against_base: refusals paired with the base's, prompt by prompt; None for the base itself."""

    side: str
    refused: Rate
    broken: Rate
    harmful: Rate
    against_base: PairedRates | None


class PolicyRow(Record):
    """One intervention at one strength; sets: name of the set -> rates."""

    name: str
    kind: str
    strength: float | None
    sets: dict[str, SetRates]


class FrontierPoint(Record):
    """One strength of a row on the calibration split."""

    strength: float
    category_refused: Rate
    benign_refused: Rate
    benign_broken: Rate
    chosen: bool


def expected_over_refusal(refused: Rate) -> float | None:
    """(k + 1) / (n + 1) of benign calibration prompts, by which strengths are allowed (paving.training.strength)."""
    return None if refused.rate is None else (refused.k + 1) / (refused.n + 1)


class LayerSummary(Record):
    """Where the circuit and its edit lie: mean score of all and of chosen channels, how many are chosen, norm of α·Δθ."""

    layer: int
    mean_score: float
    chosen_score: float | None
    chosen: int
    delta_norm: float | None


class PolicyMetrics(Record):
    """What `metrics.json` of a circuit run holds.

    over_refusal_limit  a fraction, which `expected_over_refusal` of calibration prompts was held to where α was chosen by it
    owners_alpha        whether the edit's α is its owner's, and not the one that the limit chooses
    touched             share of the parameters
    ood, ood_benign     name of a set of further prompts -> file or dataset
    held_out            the pairs that were asked, where the run's configuration names none
    deltas              name of a row -> folder of the further delta that it measures, seen from the run's
    left_out            held-out prompts that stand among the run's own pairs, and were not asked
    """

    schema_version: int = 1
    run: str
    model: str
    category: str
    seed: int
    judge: str
    decoding: dict[str, Any]
    pairs: dict[str, int]
    ood: dict[str, str] = Field(default_factory=dict)
    ood_benign: dict[str, str] = Field(default_factory=dict)
    held_out: str | None = None
    deltas: dict[str, str] = Field(default_factory=dict)
    left_out: int = 0
    over_refusal_limit: float
    owners_alpha: bool = False
    touched: float
    layers: list[LayerSummary]
    frontier: dict[str, list[FrontierPoint]]
    rows: list[PolicyRow]


def policy_row(
    backbone: Backbone,
    spec: RowSpec,
    sets: Sequence[PromptSet],
    protocol: Protocol,
    folder: Path,
    stage: Stage,
    *,
    base: Mapping[str, Mapping[str, Label]] | None = None,
) -> tuple[PolicyRow, dict[str, dict[str, Label]]]:
    """One row on every set, and its labels: set -> prompt id -> label. base: the base row's labels, to pair with.

    folder: completions and verdicts go to SET/completions and SET/verdicts
    """
    rates, labels = {}, {}
    for s in sets:
        completions = completions_of(backbone, s.prompts, spec, protocol, folder / s.name, (), stage)
        file = f"{spec.intervention.name}.jsonl"
        found = judged(folder / s.name / "completions" / file, protocol.judge, folder / s.name / "verdicts" / file, stage)
        labels[s.name] = {c.id: label for c, label in zip(completions, found, strict=True)}
        rates[s.name] = set_rates(s, labels[s.name], base and base[s.name])
    return PolicyRow(name=spec.intervention.name, kind=spec.kind, strength=spec.scale, sets=rates), labels


def set_rates(s: PromptSet, labels: Mapping[str, Label], base: Mapping[str, Label] | None) -> SetRates:
    def share(label: Label) -> Rate:
        return wilson(sum(v is label for v in labels.values()), len(labels))

    return SetRates(
        side=s.side,
        refused=share(Label.HARMLESS_REFUSAL),
        broken=share(Label.HARMLESS_BROKEN),
        harmful=share(Label.HARMFUL),
        against_base=None if base is None else paired_rates(_refused(labels), _refused(base)),
    )


def _refused(labels: Mapping[str, Label]) -> dict[str, bool]:
    return {i: label is Label.HARMLESS_REFUSAL for i, label in labels.items()}
