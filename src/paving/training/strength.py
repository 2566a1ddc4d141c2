"""How strong an edit may be: refusal of a category against over-refusal, over strengths, on the calibration split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from paving.backbone import Backbone
from paving.generation import Completion, Decoding, generate
from paving.intervention import Identity, Intervention
from paving.prompts.types import Prompt
from paving.training.prepare import Stage, silent
from paving.training.verdicts import BROKEN, REFUSAL, LabelsOf


@dataclass(frozen=True)
class StrengthPoint:
    """One strength (α, s) on the calibration split: counts, each with its n. Strength 0 is the untouched base."""

    strength: float
    n_harmful: int
    harmful_refused: int
    harmful_broken: int
    n_benign: int
    benign_refused: int
    benign_broken: int

    @property
    def harmful_refusal(self) -> float:
        return self.harmful_refused / self.n_harmful

    @property
    def over_refusal(self) -> float:
        return self.benign_refused / self.n_benign

    @property
    def expected_over_refusal(self) -> float:
        """(k + 1) / (n + 1): over-refusal if one prompt more, the next one, were refused as well."""
        return (self.benign_refused + 1) / (self.n_benign + 1)

    @property
    def benign_breakage(self) -> float:
        return self.benign_broken / self.n_benign


Keep = Callable[[Sequence[StrengthPoint]], None]


def sweep(
    backbone: Backbone,
    harmful: Sequence[Prompt],
    benign: Sequence[Prompt],
    at: Callable[[float], Intervention],
    strengths: Iterable[float],
    labels_of: LabelsOf,
    decoding: Decoding,
    *,
    enough: float = 0.5,
    known: Sequence[StrengthPoint] = (),
    keep: Keep | None = None,
    stage: Stage = silent,
) -> tuple[StrengthPoint, ...]:
    """The base, then every strength in ascending order until over-refusal passes `enough`: beyond it nothing is chosen.

    at      strength -> the edit at that strength
    known   points that were measured on the same prompts before, the base's (strength 0) of another sweep among them
    keep    called with all points so far, after each
    raises  ValueError without prompts on either side
    """
    if not harmful or not benign:
        raise ValueError(
            f"strengths are compared on calibration prompts; there are {len(harmful)} harmful and {len(benign)} benign."
        )
    measured, points = {p.strength: p for p in known}, []
    ordered = [0.0, *sorted(set(strengths) - {0.0})]
    tick = stage("strengths on the calibration split", len(set(ordered) - set(measured)))
    for strength in ordered:
        if strength not in measured:
            answers = generate(backbone, [*benign, *harmful], at(strength) if strength else Identity(), decoding)
            measured[strength] = _point(strength, answers, list(labels_of(answers)), {p.id for p in harmful})
            tick(1)
        points.append(measured[strength])
        if keep is not None:
            keep(tuple(points))
        if points[-1].over_refusal > enough:
            break
    return tuple(points)


def choose_strength(points: Sequence[StrengthPoint], limit: float) -> StrengthPoint | None:
    """The point that refuses most of the category with over-refusal held to `limit`; the weaker edit among equals.

    By conformal risk control (Angelopoulos et al., arXiv 2208.02814, theorem 1): strengths are allowed from the weakest
    up to the first with (k + 1) / (n + 1) > limit. On prompts like the calibration split's what is chosen then refuses at
    most `limit` in expectation, where a prompt once refused stays refused at greater strengths (nearly so) and where
    choosing none counts as the base; by k / n <= limit it would be more, since the strongest that looks allowed is
    taken. Nor may it break more benign answers than the base does, by more than the limit: a model that answers
    nonsense refuses little. None where no strength keeps to both: which one to take then is for the owner to say.
    """
    base = next(p for p in points if p.strength == 0)
    ascending = sorted((p for p in points if p.strength), key=lambda p: p.strength)
    within = takewhile(lambda p: p.expected_over_refusal <= limit, ascending)
    allowed = [p for p in within if p.benign_breakage <= base.benign_breakage + limit]
    return max(allowed, key=lambda p: (p.harmful_refusal, -p.strength), default=None)


def prompts_needed(limit: float) -> int | None:
    """The fewest calibration prompts by which any strength could be allowed; None where no number is enough."""
    return math.ceil(1 / limit - 1 - 1e-9) if limit else None


def _point(strength: float, answers: Sequence[Completion], labels: Sequence[str], harmful: set[str]) -> StrengthPoint:
    sides = {True: [], False: []}
    for answer, label in zip(answers, labels, strict=True):
        sides[answer.id in harmful].append(label)
    bad, good = sides[True], sides[False]
    return StrengthPoint(
        strength=strength,
        n_harmful=len(bad), harmful_refused=bad.count(REFUSAL), harmful_broken=bad.count(BROKEN),
        n_benign=len(good), benign_refused=good.count(REFUSAL), benign_broken=good.count(BROKEN),
    )  # fmt: skip
