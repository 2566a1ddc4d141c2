"""What a reproduced table is made of: measured cells, the paper's cells, and what differs between the two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from paving.evaluation.results import Record
from paving.reproduce.published import Column


class Cell(Record):
    """A measured cell.

    lines    what a reader sees; a terminal writes them below each other, markdown in one line
    value    the figure behind it in the unit of its column (percent, percentage points, ...); None without one
    missing  why there is nothing, and which command would mend that; None where there is something
    """

    lines: tuple[str, ...]
    value: float | None = None
    missing: str | None = None


class PaperLine(Record):
    """A row of the paper beside a measured one; cells by heading, as printed."""

    name: str
    cells: dict[str, str]


class Line(Record):
    """A measured row; cells by heading, and the rows of the paper that it is to be read beside."""

    name: str
    cells: dict[str, Cell]
    paper: tuple[PaperLine, ...] = ()


class Block(Record):
    """context: rows of the paper that no measured row stands for, such as other seeds or other backbones.

    beside: few columns, so that the paper's cells stand to the right of the measured ones and not below them
    """

    title: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    context: tuple[PaperLine, ...] = ()
    beside: bool = False


class Reproduction(Record):
    """A table made from runs.

    runs      the run folders' names, in the order they were used
    protocol  sentences: what differs from the paper's protocol, for each group of runs
    notes     sentences: how to read a column, what the paper leaves open
    """

    table: str
    title: str
    runs: tuple[str, ...]
    blocks: tuple[Block, ...]
    protocol: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def text(*lines: str, value: float | None = None) -> Cell:
    return Cell(lines=lines, value=value)


def missing(why: str) -> Cell:
    """n/a, with the reason and what would mend it."""
    return Cell(lines=("n/a",), missing=why)


def nothing_to_say() -> Cell:
    """A cell that this row does not have, in the paper as here: the gate policy of the base, for one."""
    return Cell(lines=("–",))


def line(name: str, columns: Iterable[Column], cells: Mapping[str, Cell], paper: Iterable[PaperLine] = ()) -> Line:
    """A row with a cell for every column. raises KeyError where one was forgotten: no cell is empty by oversight."""
    return Line(name=name, cells={c.heading: cells[c.heading] for c in columns}, paper=tuple(paper))


def unavailable(name: str, columns: Iterable[Column], why: str, paper: Iterable[PaperLine] = ()) -> Line:
    """A row of which nothing can be measured from these runs, for one reason."""
    return Line(name=name, cells={c.heading: missing(why) for c in columns}, paper=tuple(paper))
