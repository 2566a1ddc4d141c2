"""`paving utility RUN`: what an edit costs on ordinary benchmarks. Base and edited model answer the same questions.

Each subtask's answers are a file in the run folder's `utility/`; asked again in the same way they are taken from there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from paving.backbone import Backbone
from paving.controller.residual_paving import ResidualPaving
from paving.controller.store import load_controller
from paving.evaluation.utility import BASE, Answers, Settings, TaskUtility, Utility, compare_task, read_utility
from paving.intervention import Identity, Intervention
from paving.run import Means, report
from paving.run_folder import RunError, read_config, write_text

if TYPE_CHECKING:
    from lm_eval.api.task import Task

FILE = "utility.json"
FOLDER = "utility"


class Row(NamedTuple):
    """name: in files and tables; state: names what is asked, so that another edit's answers are not taken for this one's."""

    name: str
    intervention: Intervention
    state: str


def utility(
    folder: Path,
    tasks: Sequence[str],
    means: Means,
    *,
    policy: str | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = True,
    batch_size: int = 16,
    include: Sequence[Path] = (),
    force: bool = False,
) -> Utility:
    """Ask every task of the base and of the run's controller; write utility.json, and the report again if there is one.

    policy  another gate policy than the deployed one; the rest: `base_and_edited`

    raises RunError for a run without a controller, a missing harness, or answers that were asked otherwise
    """
    config = read_config(folder)
    if not (folder / "controller" / "controller.json").exists():
        raise RunError(f"{folder} has no finished controller. Train it first: paving train --out {folder} ...")
    if policy == "oracle":
        raise RunError("benchmark questions have no bucket for the oracle gate; use the deployed gate, closed or open.")

    def edited(backbone: Backbone) -> list[Row]:
        controller = load_controller(folder / "controller", backbone)
        if policy is not None:
            controller = controller.with_policy(controller.policy_named(policy))
        return [Row(row_name(controller), controller, controller_state(folder, controller))]

    system = config.system if chat else None  # what the gate was fitted behind, and will be served behind
    settings = Settings(
        limit=limit, fewshot=fewshot, chat=chat, seed=config.training.seed, batch_size=batch_size, system=system
    )
    found = base_and_edited(
        folder, tasks, means, edited, model=config.model, dtype=config.dtype, settings=settings, include=include, force=force
    )
    if (folder / "metrics.json").exists():
        report(folder)
    return found


def base_and_edited(
    folder: Path,
    tasks: Sequence[str],
    means: Means,
    edited: Callable[[Backbone], Sequence[Row]],
    *,
    model: str,
    dtype: str,
    settings: Settings,
    include: Sequence[Path] = (),
    force: bool = False,
) -> Utility:
    """Ask every task of the base and of every edited row, and write `folder`/utility.json.

    tasks    names that lm-evaluation-harness knows, or task files
    include  folders with further task files
    force    ask again, and replace, what was asked otherwise before

    raises RunError for a missing harness, or answers that were asked otherwise; ValueError for a task that cannot be had
    """
    found = read_utility(folder / FILE) or Utility(model=model, tasks=[])
    harness = utility_harness()
    # Before a model is loaded: a task that is not known, or whose data cannot be had, is known within the first minute.
    settings = settings.model_copy(update={"harness": harness.HARNESS})
    loaded = [harness.load_tasks(name, include, settings.fewshot) for name in dict.fromkeys(tasks)]
    backbone = means.load(model, dtype)
    base = f"{backbone.fingerprint}/{backbone.dtype}"
    rows = (Row(BASE, Identity(), base), *(row._replace(state=f"{base}/{row.state}") for row in edited(backbone)))
    known = known_answers(folder, loaded, rows, settings, harness, force=force)
    for name, subtasks in loaded:
        answers: dict[str, list[Answers]] = {row.name: [] for row in rows}
        for subtask, task in subtasks.items():
            for row in rows:
                if (subtask, row.name) not in known:
                    stage = _named_stage(means, f"{subtask}, {row.name}")
                    asked = harness.HarnessModel(
                        backbone, row.intervention, chat=settings.chat, batch_size=settings.batch_size, stage=stage
                    )
                    known[subtask, row.name] = harness.ask(subtask, task, asked, settings, row=row.name, asked=row.state)
                    path = answers_path(folder, subtask, row.name)
                    write_text(path, known[subtask, row.name].model_dump_json(indent=1))
                answers[row.name].append(known[subtask, row.name])
        for row in rows[1:]:
            found = with_task(found, compare_task(name, answers[BASE], answers[row.name]))
        write_text(folder / FILE, found.model_dump_json(indent=1))
    return found


def utility_harness() -> ModuleType:
    """The part that needs lm-evaluation-harness. raises RunError where it is not installed."""
    try:
        from paving.evaluation import utility_harness as harness
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise RunError("benchmarks need lm-evaluation-harness: pip install 'paving[lm-eval]'.") from error
    return harness


def known_answers(
    folder: Path,
    loaded: Sequence[tuple[str, Mapping[str, Task]]],
    rows: Sequence[Row],
    settings: Settings,
    harness: ModuleType,
    *,
    force: bool,
) -> dict[tuple[str, str], Answers]:
    """(subtask, row) -> what was asked before in just this way.

    raises RunError, before anything is asked, for a file that holds other answers, unless they may be replaced
    """
    known = {}
    for _, subtasks in loaded:
        for subtask, task in subtasks.items():
            for row in rows:
                path = answers_path(folder, subtask, row.name)
                if not path.exists():
                    continue
                wanted = {
                    "task": subtask,
                    "row": row.name,
                    "asked": row.state,
                    "source": harness.source_of(task, settings.limit),
                    **settings.model_dump(),
                }
                try:
                    there = Answers.model_validate_json(path.read_text(encoding="utf-8"))
                except ValueError as error:
                    if force:
                        continue
                    raise RunError(
                        f"{path} is damaged or of another version. --force asks again and replaces it."
                    ) from error
                held = {**there.settings.model_dump(), **{k: getattr(there, k) for k in ("task", "row", "asked", "source")}}
                other = [f"{k}: {held[k]} there, {wanted[k]} asked" for k in wanted if held[k] != wanted[k]]
                if not other:
                    known[subtask, row.name] = there
                elif not force:
                    raise RunError(
                        f"{path} holds answers that were asked otherwise ({'; '.join(other)}). "
                        "Ask as before, or replace them with --force. Nothing was changed."
                    )
    return known


def row_name(controller: ResidualPaving) -> str:
    """`thresholded`, or `thresholded+veto` where the veto may close the gate."""
    return controller.policy.name + ("+veto" if controller.use_veto and controller.policy.vetoable else "")


def controller_state(folder: Path, controller: ResidualPaving) -> str:
    weights = hashlib.sha256((folder / "controller" / "controller.safetensors").read_bytes()).hexdigest()[:16]
    return f"{weights}/{controller.policy!r}/{controller.scale}/{controller.use_veto}/{controller.mixture!r}"


def answers_path(folder: Path, subtask: str, row: str) -> Path:
    return folder / FOLDER / f"{re.sub(r'[^A-Za-z0-9_-]', '_', subtask)}.{row}.json"


def with_task(found: Utility, new: TaskUtility) -> Utility:
    """With `new` in the place of the same task under the same policy, or at the end."""
    kept = {(t.task, t.policy): t for t in found.tasks} | {(new.task, new.policy): new}
    return found.model_copy(update={"tasks": list(kept.values())})


def _named_stage(means: Means, name: str):
    return lambda what, total: means.stage(f"{name}: {what}", total)
