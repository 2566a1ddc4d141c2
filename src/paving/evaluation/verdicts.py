"""Verdict files: one JSON line for each judged completion, with the hashes that say what was judged, and by whom."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from paving.evaluation.json_lines import Line, RowError, read_objects
from paving.evaluation.judges.answers import Answer
from paving.evaluation.judges.protocol import Judged, Label, Verdict
from paving.prompts.rows import shown
from paving.prompts.types import Bucket

EXAMPLE = '{"id": "...", "judge": "rules-2", "label": "HARMLESS-REFUSAL"}'


@dataclass(frozen=True)
class JudgedLine:
    """One line of a verdict file. What it holds suffices to match and to count, never to read: texts stay outside.

    line         of the completions file; None in files that a run's evaluation wrote
    text_sha256  `text_hash` of prompt and response; None likewise
    key          `verdict_key`: this verdict may be taken again for anything that has the same; None likewise
    """

    id: str
    line: int | None
    bucket: Bucket | None
    truncated: bool
    judge: str
    label: Label
    reason: str
    text_sha256: str | None
    key: str | None

    def as_json(self) -> str:
        # ASCII escapes: half a surrogate pair, which JSON can spell, cannot be written as UTF-8.
        return json.dumps({**asdict(self), "refusal": Verdict(self.label, self.reason).refusal})


def judged_line(answer: Answer, judge: str, verdict: Verdict) -> JudgedLine:
    return JudgedLine(
        id=answer.id,
        line=answer.line,
        bucket=answer.bucket,
        truncated=answer.truncated,
        judge=judge,
        label=verdict.label,
        reason=verdict.reason,
        text_sha256=text_hash(answer.prompt, answer.response),
        key=verdict_key(judge, answer),
    )


def text_hash(prompt: str, response: str) -> str:
    """The name of a completion by its content, whatever id or bucket it has: sha256, hexadecimal."""
    return _sha256([prompt, response])


def verdict_key(judge: str, answer: Judged) -> str:
    """The name of a verdict by everything that a judge is shown, and the judge itself: sha256, hexadecimal."""
    return _sha256([judge, answer.prompt, answer.response, answer.bucket, answer.truncated])


def _sha256(content: list[object]) -> str:
    # As JSON, so that ("ab", "c") and ("a", "bc") differ, and half a surrogate pair is no error.
    return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()


def read_verdicts(path: Path, *, torn_tail: bool = False) -> Iterator[JudgedLine]:
    """The verdicts of a file, in its order and in constant memory. raises RowError for a line that is none."""
    for line in read_objects(path, example=EXAMPLE, torn_tail=torn_tail):
        yield JudgedLine(
            id=line.id(),
            line=_line_number(line),
            bucket=line.bucket(),
            truncated=line.flag("truncated"),
            judge=line.text("judge"),
            label=_label(line),
            reason=line.optional_text("reason") or "",
            text_sha256=line.optional_text("text_sha256"),
            key=line.optional_text("key"),
        )


def _label(line: Line) -> Label:
    name = line.text("label")
    if name not in list(Label):
        raise RowError(f"{line.place}: `label` is {shown(name)}; allowed: {', '.join(Label)}.")
    return Label(name)


def _line_number(line: Line) -> int | None:
    number = line.cells.get("line")
    if number is None or (isinstance(number, int) and not isinstance(number, bool)):
        return number
    raise RowError(f"{line.place}: `line` is {shown(number)}, which is no line number of a completions file.")
