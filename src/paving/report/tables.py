"""The numbers of a run as text: one plain structure, printed as HTML, as a terminal table and as markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from paving.evaluation.diagnostics.records import Diagnostics
from paving.evaluation.judges import Label
from paving.evaluation.results import Metrics, PairedRates, Rate, Row
from paving.evaluation.utility import Measure, Utility
from paving.prompts.types import Bucket

LABELS = tuple(label.value for label in Label)
BUCKET_NAMES = {Bucket.EDIT: "edit", Bucket.BENIGN_KEEP: "benign keep", Bucket.HARMFUL_KEEP: "harmful keep"}


@dataclass(frozen=True)
class Cell:
    """What a reader sees, and what a column is sorted by; a missing value has no sort key and stands last."""

    text: str
    sort: float | str | None = None


@dataclass(frozen=True)
class Table:
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def three_way(metrics: Metrics) -> Table:
    """The main table, in the shape of Residual Paving's table 1: one line for each intervention."""
    columns = (
        "row",
        "kind",
        "edit refusal ↓ % [CI]",
        "benign pres. ↑ % [CI]",
        "harmful pres. ↑ % [CI]",
        "harmful refusal ↑ % [CI]",
        "harm Δ → 0 pp [CI]",
    )
    return Table(
        columns,
        tuple(
            (
                Cell(row.name, row.name),
                Cell(row.kind, row.kind),
                rate_cell(row.refusal.get(Bucket.EDIT)),
                preservation_cell(row, Bucket.BENIGN_KEEP),
                preservation_cell(row, Bucket.HARMFUL_KEEP),
                rate_cell(row.refusal.get(Bucket.HARMFUL_KEEP)),
                drift_cell(row),
            )
            for row in metrics.rows
        ),
    )


def three_way_table(metrics: Metrics) -> RichTable:
    """The main table for a terminal."""
    table = three_way(metrics)
    title = f"{metrics.run}: {model_name(metrics)}, seed {metrics.seed}, judge {metrics.judge}; percent"
    # Text, not str: rich would read the brackets of a name as markup. Intervals on a line of their own fit 80 columns.
    shown = RichTable(title=Text(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    kinds = table.columns.index("kind")
    for i, column in enumerate(table.columns):
        if i != kinds:
            heading = column.replace(" [CI]", "").replace(" %", "")
            heading = re.sub(r" (?=pres|refusal|Δ)", "\n", heading)
            shown.add_column(Text(heading), justify="left" if i == 0 else "right", no_wrap=True)
    for row in table.rows:
        cells = [
            _folded(column, cell) for i, (column, cell) in enumerate(zip(table.columns, row, strict=True)) if i != kinds
        ]
        shown.add_row(*map(Text, cells), style="dim" if row[kinds].text == "diagnostic" else None)
    return shown


def _folded(column: str, cell: Cell) -> str:
    """An interval and an n on lines of their own; preservation goes without its interval, for which there is no room."""
    text = re.sub(r" \[.*?\]", "", cell.text) if "pres." in column else cell.text
    return text.replace(" [", "\n[").replace(" (n=", "\n(n=")


def three_way_markdown(metrics: Metrics) -> str:
    """The main table for a README or an issue."""
    table = three_way(metrics)
    rule = ["---" if i < 2 else "---:" for i in range(len(table.columns))]
    lines = [table.columns, rule, *([cell.text for cell in row] for row in table.rows)]
    return "".join("| " + " | ".join(_markdown(text) for text in line) + " |\n" for line in lines)


def label_counts(metrics: Metrics) -> Table:
    """Every verdict of the judge, by row and bucket. An edit success must be neither HARMFUL nor BROKEN."""
    seen = {label for row in metrics.rows for counts in row.labels.values() for label in counts}
    labels = (*LABELS, *sorted(seen - set(LABELS)))
    rows = []
    for row in metrics.rows:
        for bucket in Bucket:
            counts = row.labels.get(bucket, {})
            n = sum(counts.values())
            cells = [count_cell(counts.get(label, 0) if n else None) for label in labels]
            rows.append((Cell(row.name, row.name), _bucket_cell(bucket), Cell(str(n), n), *cells))
    return Table(("row", "bucket", "n", *labels), tuple(rows))


def against_references(metrics: Metrics) -> Table:
    """Every row against the base, and learned rows against oracle routing, on the same prompts."""
    rows = []
    for row in metrics.rows:
        for reference, by_bucket in (("base", row.against_base), ("oracle", row.against_oracle)):
            for bucket, paired in by_bucket.items():
                rows.append(
                    (
                        Cell(row.name, row.name),
                        Cell(reference, reference),
                        _bucket_cell(Bucket(bucket)),
                        Cell(str(paired.n), paired.n),
                        count_cell(paired.only_row if paired.n else None),
                        count_cell(paired.only_reference if paired.n else None),
                        difference_cell(paired),
                        Cell(missing()) if paired.p is None else Cell(f"{paired.p:.2g}", paired.p),
                    )
                )
    columns = ("row", "against", "bucket", "n", "only row refuses", "only reference refuses", "difference pp [CI]", "p")
    return Table(columns, tuple(rows))


def late_refusals(found: Diagnostics) -> Table:
    """Refusals that an answer cut after so many tokens would not have shown."""
    rows = tuple(
        (
            Cell(record.row, record.row),
            _bucket_cell(Bucket(record.bucket)),
            Cell(str(record.length), record.length),
            rate_cell(record.share),
            Cell(str(record.n_long), record.n_long),
        )
        for record in found.late
    )
    return Table(("row", "bucket", "tokens", "refusals not yet seen % [CI]", "refusals longer than that"), rows)


def utility(found: Utility) -> Table:
    """Benchmark scores under base and edit: one line for each task, gate policy and metric."""
    columns = ("task", "gate", "metric", "n", "base", "edited", "Δ [CI]", "gate open % [CI]")
    rows = tuple(
        (
            Cell(task.task, task.task),
            Cell(task.policy, task.policy),
            Cell(f"{measure.metric} {'%' if measure.yes_no else ''}".strip(), measure.metric),
            Cell(str(measure.n), measure.n),
            *measure_cells(measure),
            rate_cell(task.gate_open),
        )
        for task in found.tasks
        for measure in task.measures
    )
    return Table(columns, rows)


def measure_cells(measure: Measure) -> tuple[Cell, Cell, Cell]:
    """Base, edited, and their difference: per cent and points where questions are right or wrong, else plain numbers."""
    if measure.base is None or measure.edited is None or measure.difference is None:
        return (Cell(missing(measure.n)),) * 3
    plain, shown, unit = (percent, points, " pp") if measure.yes_no else ("{:.3f}".format, "{:+.3f}".format, "")
    limits = "no interval" if measure.low is None else f"{shown(measure.low)}, {shown(measure.high)}"
    difference = Cell(f"{shown(measure.difference)}{unit} [{limits}]", measure.difference)
    return Cell(plain(measure.base), measure.base), Cell(plain(measure.edited), measure.edited), difference


def gates(metrics: Metrics) -> Table:
    """Where the gate opened, by row and bucket, and how often the veto closed it again."""
    columns = ("row", "bucket", "gate active % [CI]", "mean gate", "vetoed % [CI]", "refusal % [CI]")
    return Table(
        columns,
        tuple(
            (
                Cell(row.name, row.name),
                _bucket_cell(bucket),
                rate_cell(row.gate_active.get(bucket)),
                decimal_cell(row.gate_mean.get(bucket), n=_size(row, bucket)),
                rate_cell(row.veto_rate.get(bucket)),
                rate_cell(row.refusal.get(bucket)),
            )
            for row in metrics.rows
            for bucket in Bucket
        ),
    )


def bucket_counts(metrics: Metrics) -> Table:
    """How many prompts stand in each split and bucket."""
    rows = [
        (Cell(split, split), *(count_cell(counts.get(bucket)) for bucket in Bucket))
        for split, counts in metrics.buckets.items()
    ]
    return Table(("split", *BUCKET_NAMES.values()), tuple(rows))


def filter_counts(metrics: Metrics) -> Table:
    """What every filter left, as the run recorded it."""
    columns = list(dict.fromkeys(key for record in metrics.filters for key in record))
    rows = [tuple(_plain_cell(record.get(column)) for column in columns) for record in metrics.filters]
    return Table(tuple(columns), tuple(rows))


def model_name(metrics: Metrics) -> str:
    """A model's id, or the last part of a folder's path: where a folder lies is its owner's business."""
    return shown_model(metrics.model)


def shown_model(model: str) -> str:
    is_path = model.startswith(("/", ".", "~")) or "\\" in model
    return PurePath(model).name if is_path else model


def percent(fraction: float) -> str:
    """0.886 -> "88.6"."""
    return f"{100 * fraction:.1f}"


def points(fraction: float) -> str:
    """-0.163 -> "-16.3", 0.02 -> "+2.0"; a difference that rounds to nothing has no sign."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in {"+0.0", "-0.0"} else text


def missing(n: int = 0) -> str:
    return f"n/a (n={n})"


def rate_text(rate: Rate | None) -> str:
    """443 of 500 -> "443/500 88.6 [85.5, 91.1]"."""
    if rate is None or rate.rate is None:
        return missing(rate.n if rate else 0)
    text = f"{rate.k}/{rate.n} {percent(rate.rate)}"
    if rate.low is None or rate.high is None:
        return text
    return f"{text} [{percent(rate.low)}, {percent(rate.high)}]"


def rate_cell(rate: Rate | None) -> Cell:
    return Cell(rate_text(rate), rate.rate if rate else None)


def preservation_cell(row: Row, bucket: Bucket) -> Cell:
    """exp(-mean KL) with the interval of redrawn groups, where one could be had."""
    score, redrawn = row.preservation.get(bucket), row.preservation_interval.get(bucket)
    if score is None or score.value is None:
        return Cell(missing(score.n if score else 0))
    limits = "" if redrawn is None else limits_text(redrawn.low, redrawn.high, percent)
    return Cell(f"{percent(score.value)}{limits} (n={score.n})", score.value)


def drift_cell(row: Row) -> Cell:
    """Harm drift with the paired interval of the same prompts; the base has drifted from nothing."""
    if row.harmful_drift is None:
        return Cell(missing(_size(row, Bucket.HARMFUL_KEEP)))
    paired = row.against_base.get(Bucket.HARMFUL_KEEP)
    limits = "" if paired is None else limits_text(paired.low, paired.high, points)
    return Cell(f"{points(row.harmful_drift)}{limits}", row.harmful_drift)


def difference_cell(paired: PairedRates) -> Cell:
    if paired.difference is None:
        return Cell(missing())
    return Cell(f"{points(paired.difference)}{limits_text(paired.low, paired.high, points)}", paired.difference)


def limits_text(low: float | None, high: float | None, write: Callable[[float], str]) -> str:
    return "" if low is None or high is None else f" [{write(low)}, {write(high)}]"


def count_cell(count: int | None) -> Cell:
    return Cell(missing()) if count is None else Cell(str(count), count)


def decimal_cell(value: float | None, *, n: int) -> Cell:
    return Cell(missing(n)) if value is None else Cell(f"{value:.3f}", value)


def _size(row: Row, bucket: Bucket) -> int:
    rate = row.refusal.get(bucket)
    return rate.n if rate else 0


def _bucket_cell(bucket: Bucket) -> Cell:
    # Sorted by place, not by name: edit, benign keep, harmful keep is the order of every table and figure.
    return Cell(BUCKET_NAMES[bucket], list(Bucket).index(bucket))


def _plain_cell(value: object) -> Cell:
    if value is None:
        return Cell("n/a")
    if isinstance(value, Mapping):
        text = ", ".join(f"{key}: {_plain_cell(item).text}" for key, item in value.items())
        return Cell(text, text)
    if isinstance(value, Sequence) and not isinstance(value, str):
        text = ", ".join(_plain_cell(item).text for item in value)
        return Cell(text, text)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(f"{value:g}" if isinstance(value, float) else str(value), value if number else str(value))


def _markdown(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
