"""The command on benchmarks: what an edit costs where nothing should change."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paving.terminal import AsJson, err, one_line_errors, say

if TYPE_CHECKING:
    from paving.evaluation.utility import TaskUtility


@one_line_errors
def utility(
    folder: Annotated[Path, typer.Argument(help="Run folder with a finished controller, or circuit run with a delta.")],
    tasks: Annotated[str, typer.Option(help="lm-evaluation-harness tasks or task files, as mmlu,gsm8k or my-task.yaml.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many questions of each subtask.")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question. Default: the task's.")] = None,
    include_path: Annotated[list[Path] | None, typer.Option(help="Folder with further task files.")] = None,
    policy: Annotated[
        str | None, typer.Option(help="Another gate policy: soft, hard, conformal:0.05, closed, open ...")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Of a circuit run: also these rows that it was evaluated against.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat/--plain", help="Ask in the model's chat template, or in bare text.")] = True,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    force: Annotated[bool, typer.Option(help="Replace answers that were asked otherwise before.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="Let a model repository run its own code.")] = False,
    as_json: AsJson = False,
) -> None:
    """Benchmark scores of the base and of the edited model on the same questions, with the difference and its interval."""
    from paving import circuit_run
    from paving.progress import live_progress
    from paving.run import Means
    from paving.utility import FILE
    from paving.utility import utility as controller_utility

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ValueError("--tasks names no task. Write for example: --tasks mmlu,gsm8k")
    measure = controller_utility if policy is None else partial(controller_utility, policy=policy)
    is_circuit = (folder / "circuit.json").exists()
    if is_circuit:
        if policy is not None:
            raise ValueError(f"{folder} is a circuit run: its edit stands in the weights, and no --policy gates it.")
        measure = partial(circuit_run.utility, against=against or ())
    elif against:
        raise ValueError(f"{folder} is a controller's run: --against is for circuit runs; see paving compare.")
    with live_progress(err, quiet=as_json) as (stage, watch, note):
        means = Means.default(device=device, trust_remote_code=trust_remote_code, stage=stage, watch=watch, say=note)
        found = measure(
            folder, names, means,
            limit=limit, fewshot=fewshot, chat=chat, batch_size=batch_size, include=include_path or (), force=force,
        )  # fmt: skip
    if as_json:
        print(found.model_dump_json(indent=1))
        return
    for task in found.tasks:
        print_task(task, gated=not is_circuit)
    say(f"answers: {folder / FILE}")


def print_task(task: TaskUtility, *, gated: bool) -> None:
    """Lines rather than a table: the names of tasks and metrics fill a terminal by themselves."""
    from paving.report import tables

    gate = f"gate {task.policy}, open on {tables.rate_text(task.gate_open)} of its prompts" if gated else task.policy
    say(f"{task.task}: {gate}")
    for measure in task.measures:
        base, edited, difference = tables.measure_cells(measure)
        say(
            f"  {measure.metric}{' %' if measure.yes_no else ''}, n={measure.n}: "
            f"base {base.text}, edited {edited.text}, Δ {difference.text}"
        )
    if task.cut:
        say(f"  {task.cut} prompts did not fit the context and lost their beginning")
    if task.unpaired:
        say(f"  no value for each question, so not compared: {', '.join(task.unpaired)}")
