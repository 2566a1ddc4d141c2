"""A reproduced table as markdown, for a terminal of 80 columns, and as JSON. Measured rows plain, the paper's beside."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from paving.reproduce.published import Column
from paving.reproduce.result import Block, Cell, Line, Reproduction

# Characters: the name of a row, and the most that a column gets before its text folds (less where two stand beside
# each other to be compared, which they could not be in two tables).
NAME_WIDTH, WIDEST, WIDEST_BESIDE = 22, 24, 20


@dataclass
class Reasons:
    """Why cells are empty, lettered in the order they are met, each told once."""

    letters: dict[str, str] = field(default_factory=dict)

    def mark(self, cell: Cell) -> tuple[str, ...]:
        """The cell's lines, with the letter of its reason where something is missing."""
        if cell.missing is None:
            return cell.lines
        letter = self.letters.setdefault(cell.missing, _letter(len(self.letters)))
        return (*cell.lines[:-1], f"{cell.lines[-1]} ({letter})") if len(cell.lines) == 1 else (*cell.lines, f"({letter})")

    def told(self) -> Iterator[str]:
        for why, letter in self.letters.items():
            yield f"({letter}) {why}"


@dataclass(frozen=True)
class Shown:
    """A row as text: name, one tuple of lines a column, and whether it is the paper's."""

    name: str
    cells: tuple[tuple[str, ...], ...]
    printed: bool


def markdown(found: Reproduction) -> str:
    """For docs or an issue; tables do not wrap there, so nothing is split."""
    reasons = Reasons()
    parts = [f"## Table {found.table}: {found.title}\n"]
    for block in found.blocks:
        heads, rows = shown(block, reasons)
        table = [("", *heads), ["---"] * (len(heads) + 1)]
        for row in rows:
            cells = [_plain(row.name), *(_cell(" ".join(lines)) for lines in row.cells)]
            table.append([f"*{c}*" if row.printed and c else c for c in cells])
        parts.append(f"**{_plain(block.title)}**\n\n" + "".join("| " + " | ".join(line) + " |\n" for line in table))
    told = [*found.protocol, *found.notes, *(f"n/a {reason}" for reason in reasons.told())]
    return "\n".join([*parts, "".join(f"- {_plain(sentence)}\n" for sentence in told)])


def terminal(found: Reproduction, width: int = 80) -> RenderableType:
    """The same for a terminal of so many columns; what does not fit side by side follows below, the paper's rows dim."""
    reasons = Reasons()
    parts: list[RenderableType] = [Text(f"Table {found.table}: {found.title}", style="bold")]
    for block in found.blocks:
        heads, rows = shown(block, reasons)
        parts += _folded(block, heads, rows, width)
    for sentence in (*found.protocol, *found.notes):
        parts += [Text(""), Text(sentence)]
    parts += [Text(f"n/a {reason}") for reason in reasons.told()]
    return Group(*parts)


def shown(block: Block, reasons: Reasons) -> tuple[list[str], list[Shown]]:
    """Headings and rows of a block: the paper's rows below their measured one, or its cells to the right of it."""
    if block.beside:
        return _beside(block, reasons)
    rows = []
    for line in block.lines:
        rows.append(Shown(line.name, tuple(reasons.mark(line.cells[c.heading]) for c in block.columns), printed=False))
        rows += [Shown(p.name, _printed(block.columns, p.cells), printed=True) for p in line.paper]
    rows += [Shown(p.name, _printed(block.columns, p.cells), printed=True) for p in block.context]
    return [heading(c) for c in block.columns], rows


def heading(column: Column) -> str:
    return f"{column.heading} {column.unit}".strip()


def _beside(block: Block, reasons: Reasons) -> tuple[list[str], list[Shown]]:
    """Each measured column is followed by the paper's, unless the paper has nothing in any row of it."""
    has_paper = [any(p.cells.get(c.heading) for ln in block.lines for p in ln.paper) for c in block.columns]
    heads = [h for c, known in zip(block.columns, has_paper, strict=True) for h in _pair(c, known)]
    return heads, [Shown(ln.name, tuple(_both(block, ln, has_paper, reasons)), printed=False) for ln in block.lines]


def _pair(column: Column, known: bool) -> list[str]:
    return [heading(column), f"{heading(column)}, paper"] if known else [heading(column)]


def _both(block: Block, line: Line, has_paper: Sequence[bool], reasons: Reasons) -> Iterator[tuple[str, ...]]:
    for column, known in zip(block.columns, has_paper, strict=True):
        yield reasons.mark(line.cells[column.heading])
        if known:
            yield (next((p.cells[column.heading] for p in line.paper), "–"),)


def _printed(columns: Iterable[Column], cells: dict[str, str]) -> tuple[tuple[str, ...], ...]:
    # An interval on a line of its own, as the measured one has it.
    return tuple(tuple((cells[c.heading] or "–").replace(" [", "\n[").split("\n")) for c in columns)


def _folded(block: Block, heads: Sequence[str], rows: Sequence[Shown], width: int) -> Iterator[RenderableType]:
    """One table, or several with a few columns each where all of them would not fit side by side."""
    widest = WIDEST_BESIDE if block.beside else WIDEST
    for part, columns in enumerate(_packed(heads, rows, width - NAME_WIDTH, widest)):
        title = Text(block.title if part == 0 else f"{block.title}, continued")
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("", overflow="fold", max_width=NAME_WIDTH - 1)
        for i in columns:
            table.add_column(Text(_short_lines(heads[i])), overflow="fold", max_width=widest)
        for row in rows:
            cells = ["\n".join(row.cells[i]) for i in columns]
            # Text, not str: rich would read the brackets of a name or an interval as markup.
            table.add_row(*map(Text, (row.name, *cells)), style="dim" if row.printed else None)
        yield table


def _packed(heads: Sequence[str], rows: Sequence[Shown], room: int, widest: int) -> list[list[int]]:
    """Column numbers, table by table, each as wide as its longest line and together no wider than `room`."""
    tables: list[list[int]] = [[]]
    taken = 0
    for i, head in enumerate(heads):
        lines = [*_short_lines(head).split("\n"), *(text for row in rows for text in row.cells[i])]
        needed = min(max(map(len, lines), default=0), widest) + 1
        if tables[-1] and taken + needed > room:
            tables.append([])
            taken = 0
        tables[-1].append(i)
        taken += needed
    return tables


def _short_lines(head: str) -> str:
    return re.sub(r" (?=%|pp|pres|ref|gate|veto|align|active|γ)", "\n", head)


def _plain(text: str) -> str:
    """One line of markdown with nothing in it that the source of a name could have meant as markup."""
    return " ".join(re.sub(r"([|*_`<>\[\]\\])", r"\\\1", text).split())


def _cell(text: str) -> str:
    """The same for a figure: its brackets are an interval's."""
    return _plain(text).replace("\\[", "[").replace("\\]", "]")


def _letter(i: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    return ("" if i < 26 else _letter(i // 26 - 1)) + chr(ord("a") + i % 26)
