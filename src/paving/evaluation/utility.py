"""Utility retention: the same benchmark questions under the base and under an intervention, compared question by question.

Both rows answered the same questions, so their difference carries its own interval; the two scores' own intervals would
overlap long after a loss is certain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from paving.evaluation.paired import paired_rates, require_same_ids
from paving.evaluation.resampling import by_group, mean_difference
from paving.evaluation.results import Rate, Record
from paving.evaluation.statistics import wilson

BASE = "base"


class Settings(Record):
    """How the questions are asked.

    limit    the first so many questions of each subtask; None: all
    fewshot  examples before each question; None: as the task's own file says
    chat     asked in the model's chat template, which is where a gate is trained to read
    harness  version of lm-evaluation-harness; "" before anything was asked
    system   the system prompt that a chat is asked behind: the run's own; None: whatever the chat template does without one
    """

    limit: int | None
    fewshot: int | None
    chat: bool
    seed: int
    batch_size: int
    harness: str = ""
    system: str | None = None


class Question(Record):
    """One question's scores, metric -> value, and the gates of its distinct prompts; prompt: a digest of what was asked."""

    id: str
    prompt: str
    values: dict[str, float]
    gates: list[float]


class Answers(Record):
    """One subtask under one row: what a file in `utility/` holds.

    row       `base`, the gate policy, or the weight edit's name
    asked     digest of the model, and for an edited row of its edit
    source    digest of the questions and of a local task file
    cut       prompts that did not fit the context and lost their beginning, as the harness does it
    unpaired  metrics without a value for each question, such as a corpus BLEU, which cannot be paired
    """

    task: str
    row: str
    asked: str
    source: str
    settings: Settings
    questions: list[Question]
    cut: int
    higher_is_better: dict[str, bool | None]
    unpaired: list[str]


class Measure(Record):
    """One metric over n questions: means under base and edit, and edit minus base with its 95 % interval.

    metric   the harness's name; with its filter where the task has several, as `exact_match, strict-match`
    yes_no   every question is right or wrong: the interval is Tango's and p McNemar's exact test. Otherwise the interval
             is a bootstrap over questions and p is None.
    The figures are None where n == 0, the interval also where a single question cannot show any spread.
    """

    metric: str
    higher_is_better: bool | None
    yes_no: bool
    n: int
    base: float | None
    edited: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None


class TaskUtility(Record):
    """One task under one gate policy, its subtasks pooled: each question counts once.

    policy     the edited row's name
    gate_open  of the distinct prompts, those whose gate opened; a question may be asked with several prompts. Edited
               weights have no gate: all of them
    cut        prompts that lost their beginning, of the edited row
    unpaired   metrics that not every question has
    """

    task: str
    policy: str
    settings: Settings
    questions: int
    gate_open: Rate
    cut: int
    measures: list[Measure]
    unpaired: list[str]


class Utility(Record):
    """What `utility.json` holds."""

    schema_version: int = 1
    model: str
    tasks: list[TaskUtility]


def compare_task(task: str, base: Sequence[Answers], edited: Sequence[Answers]) -> TaskUtility:
    """A task from its subtasks' answers, in the same order under both rows.

    raises ValueError where the two rows were not asked the same questions in the same words
    """
    for one, other in zip(base, edited, strict=True):
        if [(q.id, q.prompt) for q in one.questions] != [(q.id, q.prompt) for q in other.questions]:
            raise ValueError(
                f"{one.task} was asked in other words under {other.row} than under {one.row}: its prompts are drawn by "
                "chance. Fix its seed in the task file; rows are compared on the same prompts only."
            )
    questions = {f"{a.task}/{q.id}": q for a in edited for q in a.questions}
    reference = {f"{a.task}/{q.id}": q for a in base for q in a.questions}
    everywhere, somewhere = _metrics([*base, *edited])
    gates = [gate for q in questions.values() for gate in q.gates]
    return TaskUtility(
        task=task,
        policy=edited[0].row,
        settings=edited[0].settings,
        questions=len(questions),
        gate_open=wilson(sum(gate > 0 for gate in gates), len(gates)),
        cut=sum(a.cut for a in edited),
        measures=[
            compare(
                metric,
                {i: q.values[metric] for i, q in reference.items()},
                {i: q.values[metric] for i, q in questions.items()},
                higher_is_better=edited[0].higher_is_better.get(metric),
            )
            for metric in everywhere
        ],
        unpaired=somewhere,
    )


def _metrics(answers: Sequence[Answers]) -> tuple[list[str], list[str]]:
    """(metrics that every question of every subtask has, all others), in the order they are met."""
    found = {m: None for a in answers for q in a.questions for m in q.values}
    everywhere = [m for m in found if all(m in q.values for a in answers for q in a.questions)]
    others = {m: None for m in [*found, *(m for a in answers for m in a.unpaired)] if m not in everywhere}
    return everywhere, list(others)


def compare(
    metric: str, base: Mapping[str, float], edited: Mapping[str, float], *, higher_is_better: bool | None
) -> Measure:
    """One metric's values, question id -> value, under base and edit.

    raises ValueError where a question has a value in one of them only, or one that is not finite
    """
    require_same_ids(edited, base)
    n = len(base)
    yes_no = n > 0 and {*base.values(), *edited.values()} <= {0, 1}
    found = {"metric": metric, "higher_is_better": higher_is_better, "yes_no": yes_no, "n": n}
    if n == 0:
        return Measure(**found, base=None, edited=None, difference=None, low=None, high=None, p=None)
    means = {"base": sum(base.values()) / n, "edited": sum(edited.values()) / n}
    if yes_no:
        paired = paired_rates({i: bool(v) for i, v in edited.items()}, {i: bool(v) for i, v in base.items()})
        return Measure(**found, **means, difference=paired.difference, low=paired.low, high=paired.high, p=paired.p)
    drawn = by_group([edited, base], {i: i for i in base}, mean_difference)
    return Measure(**found, **means, difference=drawn.value, low=drawn.low, high=drawn.high, p=None)


def read_utility(path: Path) -> Utility | None:
    """What `paving utility` measured; None where there is no such file. raises ValueError for a damaged one."""
    if not path.exists():
        return None
    try:
        return Utility.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged or of another version. Move it away; `paving utility` then measures anew."
        ) from error
