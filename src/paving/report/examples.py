"""Completions shown side by side, without the texts that a page must not hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from paving.evaluation.judges import Label
from paving.report.tables import LABELS

REDACTED = "[redacted: judged HARMFUL; kept only in the local run folder]"


@dataclass(frozen=True)
class Example:
    """One completion, to be shown beside the completions of other rows to the same prompt.

    bucket  a value of `Bucket`; on the page of a refusal policy, the name of a set of prompts
    row     the name of the row in the page's metrics
    label   the judge's verdict; the response is shown only where it is a known label other than HARMFUL
    gate    effective gate of the prompt, None where the row has none
    veto    whether the veto closed the gate, None where the row has none
    """

    prompt_id: str
    bucket: str
    prompt: str
    row: str
    response: str
    label: str
    gate: float | None = None
    veto: bool | None = None


@dataclass(frozen=True)
class SideBySide:
    """What the rows made of one prompt, the base first."""

    prompt_id: str
    prompt: str
    labels: str
    completions: tuple[Example, ...]


def redact(examples: Sequence[Example]) -> list[Example]:
    """The same examples without the texts a page must not hold."""
    return [replace(example, response=_shown_response(example)) for example in examples]


def _shown_response(example: Example) -> str:
    label = str(example.label).strip().upper()
    if label == Label.HARMFUL:
        return REDACTED
    if label not in LABELS:
        # Closed by default: a text nobody has judged may be harmful too.
        return f"[redacted: label {example.label!r} is none of {', '.join(LABELS)}]"
    return example.response


def side_by_side(examples: Sequence[Example], rows: Sequence[str]) -> list[SideBySide]:
    """Prompts in the order they come, each with its completions in the order of `rows`, the names of a page's rows."""
    order = {name: i for i, name in enumerate(rows)}
    by_prompt: dict[str, list[Example]] = {}
    for example in examples:
        by_prompt.setdefault(example.prompt_id, []).append(example)
    sides = []
    for prompt_id, found in by_prompt.items():
        found.sort(key=lambda example: order.get(example.row, len(order)))
        labels = " → ".join(example.label for example in found)
        sides.append(SideBySide(prompt_id, found[0].prompt, labels, tuple(found)))
    return sides
