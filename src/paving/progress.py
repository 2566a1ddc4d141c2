"""Progress on a terminal: one bar a stage, with losses while training. Plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging


@contextmanager
def live_progress(console: Console, *, quiet: bool = False) -> Iterator[tuple]:
    """(stage, watch, say): `stage(what, total)` gives a tick function; `watch` follows training; `say` prints a line."""
    logging.disable_progress_bar()  # transformers' own bars for loading weights would run through ours
    bar = Progress(
        TextColumn("{task.description}", markup=False),  # the name of a judge holds brackets
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=quiet or not console.is_terminal,
    )
    tasks: dict[str, int] = {}
    plain = not quiet and not console.is_terminal

    def stage(what: str, total: int):
        task = bar.add_task(what, total=total, note="")
        if plain:
            console.print(f"{what}: {total}", highlight=False, markup=False, soft_wrap=True)
        return lambda n: bar.advance(task, n)

    def watch(name: str, step: int, steps: int, losses: dict[str, float]) -> None:
        if name not in tasks or step == 1:
            tasks[name] = bar.add_task(f"training: {name}", total=steps, note="")
        note = "  ".join(f"{k} {v:.3f}" for k, v in losses.items())
        bar.update(tasks[name], completed=step, note=note)
        if plain and step == steps:
            console.print(f"training: {name}  {note}", highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        if not quiet:
            console.print(text, highlight=False)

    with bar:
        yield stage, watch, say
