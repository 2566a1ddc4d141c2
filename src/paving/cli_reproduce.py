"""`paving reproduce`: a table or figure of the paper from finished runs, the paper's values beside the measured ones."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from paving.terminal import AsJson, one_line_errors, out, say


class Shape(StrEnum):
    """What is printed or written."""

    TERMINAL = "terminal"
    MARKDOWN = "markdown"
    JSON = "json"


SHAPES = {".md": Shape.MARKDOWN, ".json": Shape.JSON}


@one_line_errors
def reproduce(
    table: Annotated[str, typer.Argument(help="1, 2/19, 3 to 7, 14 to 18, 20; or figure-2, figure-3, figure-4.")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="[RUN]...", help="Run folders, as after --runs.")] = None,
    runs: Annotated[list[Path] | None, typer.Option("--runs", help="Run folders: seeds, ablations, backbones.")] = None,
    file: Annotated[Path | None, typer.Option("--out", help="FILE.md or .json; for a figure FILE.svg or .png.")] = None,
    as_json: AsJson = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print markdown.")] = False,
    force: Annotated[bool, typer.Option(help="Overwrite --out.")] = False,
) -> None:
    """Make a table or figure of the Residual Paving paper from runs, and say what differs from its protocol."""
    from paving.reproduce import figure_name

    if as_json and as_markdown:
        raise ValueError("--json and --markdown were both given. Ask for one of them.")
    if file is not None and file.exists() and not force:
        raise FileExistsError(f"{file} exists already. Give another --out, or --force to overwrite it.")
    folders = [*(runs or ()), *(more or ())]
    if (figure := figure_name(table)) is not None:
        if as_json or as_markdown:
            raise ValueError(f"{figure} is a picture: --json and --markdown are for tables.")
        write_figure(figure, folders, file)
        return
    shape = shape_of(file, as_json, as_markdown)
    show_table(table, folders, shape, file)


def shape_of(file: Path | None, as_json: bool, as_markdown: bool) -> Shape:
    """What was asked for; a file's suffix must not contradict it."""
    asked = Shape.JSON if as_json else Shape.MARKDOWN if as_markdown else None
    if file is None:
        return asked or Shape.TERMINAL
    by_suffix = SHAPES.get(file.suffix.lower())
    if by_suffix is None:
        raise ValueError(f"--out {file} has no suffix that says what to write; allowed: {', '.join(SHAPES)}.")
    if asked not in (None, by_suffix):
        raise ValueError(f"--{asked} and --out {file} contradict each other. Leave one of them out.")
    return by_suffix


def show_table(table: str, folders: list[Path], shape: Shape, file: Path | None) -> None:
    from paving.reproduce import markdown, reproduce, terminal

    found = reproduce(table, folders)
    match shape:
        case Shape.TERMINAL:
            out.print(terminal(found, out.width))
            return
        case Shape.MARKDOWN:
            content = markdown(found)
        case Shape.JSON:
            content = found.model_dump_json(indent=1) + "\n"
    if file is None:
        print(content, end="")
        return
    write(file, content.encode())
    say(f"table {found.table}: {file}")


def write_figure(figure: str, folders: list[Path], file: Path | None) -> None:
    from paving.reproduce import draw_figure, load_run

    if file is None or file.suffix.lower() not in (".svg", ".png"):
        raise ValueError(f"{figure} is a picture: give --out {figure}.svg or --out {figure}.png.")
    write(file, draw_figure(figure, [load_run(f) for f in folders], file.suffix.lower().removeprefix(".")))
    say(f"{figure}: {file}")


def write(file: Path, content: bytes) -> None:
    """Whole or not at all, so that a kill leaves no half table under the name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_bytes(content)
    partial.replace(file)
