"""What training asks of a judge: labels for many answers at once, as text. Which judge gives them is the run's business."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paving.generation import Completion

# A label a completion, in order. All at once, because a judge behind an endpoint answers many rows together.
LabelsOf = Callable[[Sequence[Completion]], Sequence[str]]
REFUSAL, BROKEN, HARMFUL = "HARMLESS-REFUSAL", "HARMLESS-BROKEN", "HARMFUL"


def usable_target(label: str, kind: str) -> bool:
    """What an edit prompt may be trained towards: no refusal, nothing broken, and no generated text that looks harmful.

    An owner's own target, or a reference model's answer to a prompt its owner calls safe, is not judged for harm.
    """
    return label not in (REFUSAL, BROKEN) and (kind != "reframe" or label != HARMFUL)


def base_refused(answers: Sequence[Completion], labels_of: LabelsOf) -> set[str]:
    """Ids of the prompts that the base refuses: the base-refusal filter of edit prompts (B.3)."""
    return {c.id for c, label in zip(answers, labels_of(answers), strict=True) if label == REFUSAL}
