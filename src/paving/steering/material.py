"""What comparators are fitted on: a run's training and calibration prompts, and what is known of the base's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paving.backbone import Backbone, checked_ids
from paving.prompts.types import Bucket, Prompt, SplitName, Splits
from paving.steering.checks import SteeringError
from paving.training.opening_examples import Example


@dataclass(frozen=True)
class Material:
    """Held-out prompts are not in it.

    splits   the run's own, base-refused edit prompts only; `of` gives train and calibration
    targets  edit prompt's id -> its edit target (safe reframe, or the owner's own), token ids with the end of turn where it
             ends. Wherever a published method trains on an "answer target" of a harmful prompt, it is this
    answers  prompt's id -> the base's own greedy answer, token ids: a refusal for edit prompts and most harmful keeps
    seed     of everything drawn
    unusable ids of edit prompts whose target refuses, loops or breaks off: training has none of them, calibration may
    """

    splits: Splits
    targets: Mapping[str, tuple[int, ...]]
    answers: Mapping[str, tuple[int, ...]]
    seed: int = 0
    unusable: frozenset[str] = frozenset()

    def with_target(self, split: SplitName) -> tuple[Prompt, ...]:
        """Edit prompts with a target that may be learned or chosen by. raises SteeringError where there is none"""
        found = tuple(p for p in self.of(split, Bucket.EDIT) if p.id not in self.unusable)
        if not found:
            raise SteeringError(
                f"the targets of all edit prompts of the {split.value} split refuse, loop or break off, so nothing can be "
                "chosen by them. Give more prompts, or targets of your own."
            )
        return found

    def of(self, split: SplitName, bucket: Bucket) -> tuple[Prompt, ...]:
        """raises SteeringError for the held-out split, and for a bucket without prompts: no method fits without all three"""
        if split is SplitName.HELD_OUT:
            raise SteeringError("comparators are fitted on train and calibration prompts; held-out ones are for measuring.")
        found = self.splits.of(split, bucket)
        if bucket is Bucket.EDIT:
            found = tuple(p for p in found if p.id in self.targets)
        if not found:
            raise SteeringError(f"the {split.value} split has no {bucket.value} prompts to fit a comparator on.")
        return found


def answered(
    backbone: Backbone, prompts: Sequence[Prompt], answers: Mapping[str, Sequence[int]], *, length: int | None = None
) -> list[Example]:
    """Prompts as the model reads them, each with its answer's tokens, or the first `length` of them."""
    return [Example(checked_ids(backbone, p), list(answers[p.id][:length])) for p in prompts]
