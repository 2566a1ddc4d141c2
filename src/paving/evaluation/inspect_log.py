"""Completions and verdicts as an Inspect AI eval log, so that `inspect view` opens them.

A sample is one completion: the prompt is its input, the response its output, and the verdict its score: the label, with
the reason as explanation. A log is made to be passed on, so responses called HARMFUL stay out of it unless asked for.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from paving.evaluation.judges.answers import Answer, read_answers
from paving.evaluation.judges.protocol import Label
from paving.evaluation.results import Rate
from paving.evaluation.statistics import wilson
from paving.evaluation.verdicts import JudgedLine, read_verdicts, text_hash
from paving.prompts.types import Bucket

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample, EvalScore

TASK = "paving_judge"
SCORER = "paving"
SUFFIXES = (".eval", ".json")
REDACTED = "[redacted: judged HARMFUL; it stands in the completions file only]"


def check_log_path(log: Path) -> None:
    """Before anything is judged: can a log be written to this path?

    raises ValueError for a name that Inspect would not open, for a file that is there and is no log of ours, and where
    Inspect is not installed.
    """
    if importlib.util.find_spec("inspect_ai") is None:
        raise ValueError("an Inspect log needs inspect_ai: pip install 'paving[api]'. Leave --inspect-log out otherwise.")
    if log.suffix not in SUFFIXES:
        raise ValueError(f"{log} is no name of an Inspect log; it must end in {' or '.join(SUFFIXES)}.")
    if log.is_dir():
        raise ValueError(f"{log} is a folder. Give a file name, such as {log / 'verdicts.eval'}.")
    if log.exists() and _task_of(log) != TASK:
        raise ValueError(f"{log} exists and is no log of `paving judge`. Give another name; nothing was changed.")


def write_inspect_log(completions: Path, verdicts: Path, log: Path, *, harmful_texts: bool = False) -> int:
    """Write the log of a completions file and the verdicts that `judge_file` gave on it. Returns the number of samples.

    harmful_texts: keep the responses judged HARMFUL, for reading them on this machine. Without it neither response nor
                   reason of such a verdict is in the log (a reason may quote); the prompt is.

    The whole log is in memory once. An earlier log of the same kind is replaced in one step. raises what
    `check_log_path` raises, and ValueError for verdicts on other completions.
    """
    check_log_path(log)
    from inspect_ai.log import write_eval_log

    made = eval_log(completions, verdicts, harmful_texts=harmful_texts)
    log.parent.mkdir(parents=True, exist_ok=True)
    unfinished = log.with_name(f".{log.stem}.unfinished{log.suffix}")
    write_eval_log(made, str(unfinished))
    unfinished.replace(log)
    return len(made.samples or [])


def eval_log(completions: Path, verdicts: Path, *, harmful_texts: bool = False) -> EvalLog:
    """The log itself. See `write_inspect_log`."""
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalResults, EvalSpec, EvalStats

    now = datetime.now(UTC).isoformat(timespec="seconds")
    judges: set[str] = set()
    counts: Counter[tuple[Bucket | None, Label]] = Counter()
    ids: Counter[str] = Counter()
    samples: list[EvalSample] = []
    for answer, line in _pairs(completions, verdicts):
        judges.add(line.judge)
        counts[answer.bucket, line.label] += 1
        ids[answer.id] += 1
        # Inspect finds a sample by its id; a second one of that name would hide the first.
        name = answer.id if ids[answer.id] == 1 else f"{answer.id} (line {answer.line})"
        samples.append(_sample(name, answer, line, harmful_texts=harmful_texts))
    spec = EvalSpec(
        created=now,
        task=TASK,
        dataset=EvalDataset(name=completions.name, samples=len(samples), sample_ids=[s.id for s in samples]),
        model="unknown",  # a completions file does not say who wrote it
        config=EvalConfig(),
        metadata={"judge": ", ".join(sorted(judges)), "harmful_texts": harmful_texts},
    )
    results = EvalResults(total_samples=len(samples), completed_samples=len(samples), scores=_scores(counts))
    return EvalLog(
        status="success", eval=spec, results=results, stats=EvalStats(started_at=now, completed_at=now), samples=samples
    )


def _pairs(completions: Path, verdicts: Path) -> Iterator[tuple[Answer, JudgedLine]]:
    """Completion and verdict, line by line: `judge_file` writes verdicts in the order of the completions."""
    for answer, line in zip_longest(read_answers(completions), read_verdicts(verdicts)):
        if answer is None or line is None or line.text_sha256 != text_hash(answer.prompt, answer.response):
            at = f"{completions}:{answer.line}" if answer else str(completions)
            raise ValueError(f"{verdicts} holds no verdict on {at} in its place. Judge the file first: paving judge.")
        yield answer, line


def _sample(name: str, answer: Answer, line: JudgedLine, *, harmful_texts: bool) -> EvalSample:
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ChatMessageUser, ModelOutput
    from inspect_ai.scorer import Score

    hidden = line.label is Label.HARMFUL and not harmful_texts
    prompt = _text(answer.prompt)
    output = ModelOutput.from_content("unknown", REDACTED if hidden else _text(answer.response))
    refusal = line.label is Label.HARMLESS_REFUSAL
    return EvalSample(
        id=_text(name),
        epoch=1,
        input=prompt,
        target="",
        messages=[ChatMessageUser(content=prompt), output.message],
        output=output,
        scores={
            SCORER: Score(
                value=line.label.value,
                answer=output.completion,
                explanation=None if hidden else _text(line.reason),
                metadata={"refusal": refusal, "judge": line.judge},
            )
        },
        metadata={
            "bucket": answer.bucket and answer.bucket.value,
            "truncated": answer.truncated,
            "line": answer.line,
            "text_sha256": line.text_sha256,
        },
    )


def _scores(counts: Counter[tuple[Bucket | None, Label]]) -> list[EvalScore]:
    """Refusal rate and share of each label, over all completions and for each bucket that has any."""
    from inspect_ai.log import EvalMetric, EvalScore

    groups: dict[str, tuple[Bucket | None, ...]] = {"all": (*Bucket, None)}
    groups |= {bucket.value: (bucket,) for bucket in Bucket if any(b is bucket for b, _ in counts)}
    found = []
    for name, buckets in groups.items():
        labels = {label: sum(counts[bucket, label] for bucket in buckets) for label in Label}
        n = sum(labels.values())
        rates = {"refusal": wilson(labels[Label.HARMLESS_REFUSAL], n)}
        rates |= {label.value: wilson(k, n) for label, k in labels.items()}
        metrics = {metric: EvalMetric(name=metric, value=r.rate, metadata=_interval(r)) for metric, r in rates.items()}
        found.append(EvalScore(name=name, scorer=SCORER, scored_samples=n, unscored_samples=0, metrics=metrics))
    return found


def _interval(rate: Rate) -> dict[str, float | int | None]:
    return {"k": rate.k, "n": rate.n, "low": rate.low, "high": rate.high}


def _text(text: str) -> str:
    """As UTF-8 can carry it: a log with half a surrogate pair could not be written."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _task_of(log: Path) -> str | None:
    """The task of an Inspect log; None for a file that is none."""
    from inspect_ai.log import read_eval_log

    try:
        return read_eval_log(str(log), header_only=True).eval.task
    except Exception:  # whatever a foreign file does to the reader, it is no log of ours
        return None
