"""The diagnosis, part by part: each is kept as soon as it is measured, and taken from there when nothing changed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from paving.diagnose import cells, parts, useful
from paving.diagnose.cells import Grid
from paving.diagnose.study import FILE, Study, open_study
from paving.evaluation.diagnostics.records import Diagnostics
from paving.evaluation.diagnostics.usefulness import check_bert_score, overlap_available
from paving.evaluation.judges import Judge
from paving.run import Means, report
from paving.run_folder import read_config, write_text


@dataclass(frozen=True)
class Options:
    """What to measure.

    only            the parts, or None for the default ones
    again           measure although nothing changed
    bert_score      the encoder for BERTScore, or None to leave it out
    expert_prompts  most held-out prompts of each bucket that every expert policy answers
    """

    only: tuple[str, ...] | None = None
    again: bool = False
    bert_score: str | None = None
    expert_prompts: int = 64
    grid: Grid = field(default_factory=Grid)


Measure = Callable[[Study, Options], object]
# In the order they run: what costs seconds before what decodes.
MEASURES: dict[str, Measure] = {
    "late": lambda study, _: parts.late(study),
    "route": lambda study, _: parts.route(study),
    "probes": lambda study, _: parts.probes(study),
    "trajectory": lambda study, _: parts.trajectory(study),
    "norms": lambda study, _: parts.norms(study),
    "corruption": lambda study, _: parts.corruption(study),
    "usefulness": lambda study, options: useful.usefulness(study, options.bert_score),
    "experts": lambda study, options: cells.experts(study, options.expert_prompts),
    "grid": lambda study, options: cells.grid(study, options.grid),
}
PARTS = tuple(MEASURES)
DEFAULT_PARTS = tuple(p for p in PARTS if p != "grid")
READS_ANSWERS = ("late", "usefulness")


def diagnose(folder: Path, means: Means, judge: Judge | None = None, options: Options | None = None) -> Diagnostics:
    """Measure, keep every part in diagnostics.json, and write the report again with it.

    A part that stands there already is not measured again, unless the run, its controller, its judge or the part's
    options changed. Interrupted, the finished parts and all decoded answers are kept.

    raises RunError for a run that was not evaluated, ValueError for a part or an option that does not exist,
    MetricError for a measure whose package is not installed.
    """
    options = options or Options()
    asked = checked_parts(options.only)
    options.grid.check()
    if options.bert_score is not None:
        check_bert_score()  # before minutes are spent on what comes first
    study = open_study(folder, means, judge or means.judge(read_config(folder).judge))
    found = _known(study)
    for part in PARTS:
        if part not in asked:
            continue
        key = _key(study, part, options)
        if found.keys.get(part) == key and not options.again:
            means.say(f"{part}: kept from {FILE}; nothing it depends on has changed")
            continue
        started = time.perf_counter()
        record = MEASURES[part](study, options)
        found = _with_part(found, part, record, key, time.perf_counter() - started)
        write_text(folder / FILE, found.model_dump_json(indent=1))
    found = found.model_copy(update={"skipped": _skipped(found)})
    write_text(folder / FILE, found.model_dump_json(indent=1))
    report(folder)
    return found


def checked_parts(only: Collection[str] | None) -> tuple[str, ...]:
    """raises ValueError naming the first part that does not exist, and those that do."""
    if only is None:
        return DEFAULT_PARTS
    if not only:
        raise ValueError(f"no part was named; there are: {', '.join(PARTS)}.")
    for name in only:
        if name not in PARTS:
            raise ValueError(f"{name!r} is no part of a diagnosis; there are: {', '.join(PARTS)}.")
    return tuple(p for p in PARTS if p in only)


def _known(study: Study) -> Diagnostics:
    """What was found before in this folder. A part whose run, controller or judge was another is not carried on."""
    empty = Diagnostics(run=study.folder.name, judge=study.judge.name, keys={}, seconds={}, skipped={})
    path = study.folder / FILE
    if not path.exists():
        return empty
    try:
        before = Diagnostics.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError:  # damaged, or of an older version: made again, which is what reading it would ask for
        return empty
    same = [p for p, key in before.keys.items() if key.split("/")[0] == study.key()]
    kept = {p: getattr(before, p) for p in same}
    keys, seconds = ({p: had[p] for p in same} for had in (before.keys, before.seconds))
    return empty.model_copy(update={**kept, "keys": keys, "seconds": seconds})


def _with_part(found: Diagnostics, part: str, record: object, key: str, seconds: float) -> Diagnostics:
    return found.model_copy(
        update={
            part: record,
            "keys": found.keys | {part: key},
            "seconds": found.seconds | {part: round(seconds, 1)},
        }
    )


def _key(study: Study, part: str, options: Options) -> str:
    """The run's key, a slash, and the part's own: its options, and the saved answers where it reads them."""
    content: dict[str, object] = {"part": part}
    if part in READS_ANSWERS:
        paths = sorted((study.folder / "completions").glob("*.jsonl"))
        content["answers"] = [(p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in paths]
    if part == "usefulness":
        content["measures"] = [overlap_available(), options.bert_score]
    if part == "experts":
        content["prompts"] = options.expert_prompts
    if part == "grid":
        content["grid"] = repr(options.grid)
    return f"{study.key()}/{study.key(**content)}"


def _skipped(found: Diagnostics) -> dict[str, str]:
    """Parts that are not there, and how to have them."""
    return {
        part: f"not asked for; measure it with: paving diagnose RUN --only {part}"
        for part in PARTS
        if getattr(found, part) is None
    }
