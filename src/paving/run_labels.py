"""The judge as training and comparing ask it: a label for every answer, asked for once and kept in the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from paving.evaluation.judges import Exchange, Judge, judge_all
from paving.evaluation.verdicts import verdict_key
from paving.generation import Completion
from paving.processes import once
from paving.prompts.types import Bucket
from paving.training.verdicts import LabelsOf

AT_ONCE = 64  # what a judge is shown together, and the most that a kill loses


def labels_of(judge: Judge, kept: Path | None = None) -> LabelsOf:
    """Labels for many answers at once; of several processes the first asks.

    kept: a file for what was asked, a line each. A command that is given again asks for nothing twice: a judge may ask a
          fee, and may say something else the second time, which would make another run of it
    """

    def labels(answers: Sequence[Completion]) -> list[str]:
        rows = [Exchange(c.prompt, c.response, Bucket(c.bucket), c.truncated) for c in answers]
        return once(lambda: _labels(judge, rows, kept))

    return labels


def _labels(judge: Judge, rows: Sequence[Exchange], kept: Path | None) -> list[str]:
    if kept is None:
        return [verdict.label.value for verdict in judge_all(judge, rows)]
    keys = [verdict_key(judge.name, row) for row in rows]
    known = _read(kept)
    missing = list({key: row for key, row in zip(keys, rows, strict=True) if key not in known}.items())
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a", encoding="utf-8") as file:
        for start in range(0, len(missing), AT_ONCE):
            chunk = missing[start : start + AT_ONCE]
            for (key, _), verdict in zip(chunk, judge_all(judge, [row for _, row in chunk]), strict=True):
                known[key] = verdict.label.value
                file.write(json.dumps({"key": key, "label": known[key]}) + "\n")
            file.flush()
    return [known[key] for key in keys]


def _read(kept: Path) -> dict[str, str]:
    """A last line that a killed command left half written is cut off."""
    if not kept.exists():
        return {}
    whole, newline, torn = kept.read_text(encoding="utf-8").rpartition("\n")
    if torn:
        kept.write_text(whole + newline, encoding="utf-8")
    return {line["key"]: line["label"] for line in map(json.loads, whole.splitlines())}
