"""What page and terminal say and draw of `paving router shift`: where a gate opens when prompts are said otherwise."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.figure import Figure
from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from paving.evaluation.shift import AS_THEY_ARE, Shifted
from paving.prompts.types import Bucket
from paving.report.figures import draw_rates
from paving.report.svg import COLOURS, INK, MUTED, inline, new_figure
from paving.report.tables import BUCKET_NAMES, Cell, Table, percent, rate_cell

AIMS = {Bucket.EDIT: "should open", Bucket.BENIGN_KEEP: "should stay closed", Bucket.HARMFUL_KEEP: "should stay closed"}


def shift_section(found: Sequence[Shifted]) -> dict[str, object]:
    return {
        "figure": Markup(inline(_draw, found, "shift", "Share of gates that open, by what is put round the prompt")),
        "table": shift_table(found),
        "remarks": remarks(found),
    }


def shift_table(found: Sequence[Shifted]) -> Table:
    """A line for the same prompts in the same clothes; a source has a figure under its own bucket alone."""
    lines: dict[str, dict[Bucket, Cell]] = {}
    for one in found:
        lines.setdefault(one.name, {})[one.bucket] = rate_cell(one.opened)
    columns = tuple(f"{BUCKET_NAMES[b]} {'↑' if b is Bucket.EDIT else '↓'} % [CI]" for b in Bucket)
    rows = tuple((Cell(name, name), *(cells.get(b, Cell("")) for b in Bucket)) for name, cells in lines.items())
    return Table(("gates that open", *columns), rows)


def shift_terminal_table(found: Sequence[Shifted]) -> RichTable:
    table = shift_table(found)
    shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, column in enumerate(table.columns):
        shown.add_column(Text(column.replace(" % [CI]", " %")), justify="left" if i == 0 else "right", no_wrap=i > 0)
    for line in table.rows:
        shown.add_row(*(Text(cell.text.replace(" [", "\n[")) for cell in line))
    return shown


def remarks(found: Sequence[Shifted]) -> list[str]:
    """What the table does not say by itself."""
    unsaid = dict.fromkeys(f"{one.name} is n/a: {one.unsaid}" for one in found if one.unsaid is not None)
    return [*unsaid, *beyond_promise(found)]


def beyond_promise(found: Sequence[Shifted]) -> list[str]:
    """A sentence for every row that opens more often than the run promised, beyond what chance explains."""
    return [
        f"Beyond the promise of {percent(one.promised)}%: {BUCKET_NAMES[one.bucket]}, {one.name}, "
        f"{one.opened.k} of {one.opened.n} open."
        for one in found
        if one.beyond and one.promised is not None
    ]


def _draw(found: Sequence[Shifted]) -> Figure:
    by_bucket = {b: [one for one in found if one.bucket is b] for b in Bucket}
    heights = [0.55 + 0.34 * max(1, len(rows)) for rows in by_bucket.values()]
    figure = new_figure(height=sum(heights) + 0.4)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=heights)
    for ax, (bucket, rows) in zip(panels, by_bucket.items(), strict=True):
        ax.set_title(f"{BUCKET_NAMES[bucket].capitalize()}: {AIMS[bucket]}")
        names = [textwrap.fill(one.name, 22, max_lines=2) for one in rows]
        draw_rates(ax, names, [one.opened for one in rows], COLOURS[bucket])
        ax.tick_params(axis="y", labelsize=10.5)
        usual = next((one.opened.rate for one in rows if one.clothes == AS_THEY_ARE and one.opened.rate is not None), None)
        if usual is not None:
            ax.axvline(100 * usual, color=MUTED, linestyle=(0, (3, 3)), linewidth=1)
        promised = next((one.promised for one in rows if one.promised is not None), None)
        if promised is not None:
            ax.axvline(100 * promised, color=INK, linewidth=1.2)
    line = "; line: promise" if any(one.promised is not None for one in found) else ""
    panels[-1].set_xlabel(f"open, % (dashed: as they are{line})")
    return figure
