"""The numbers of a circuit run as text: refusal of every row on every set, the strengths tried, the circuit by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from paving.evaluation.refusal_policy import (
    BENIGN,
    CATEGORY,
    OOD_BENIGN,
    FrontierPoint,
    PolicyMetrics,
    PolicyRow,
    SetRates,
    expected_over_refusal,
)
from paving.evaluation.results import Rate
from paving.evaluation.utility import Utility
from paving.report.tables import (
    Cell,
    Table,
    count_cell,
    difference_cell,
    missing,
    percent,
    rate_cell,
    rate_text,
    shown_model,
)
from paving.report.tables import utility as utility_of_gates

BASE, EDITED = "base", "c-delta-theta"  # names of rows
CONTROLS = ("inverse", "random")  # rows of a circuit of the same size that attribution did not choose
SIDES = (CATEGORY, BENIGN, OOD_BENIGN, "other", "ood")
WANTED = {CATEGORY: " ↑", BENIGN: " ↓", OOD_BENIGN: " ↓"}


def refusals(metrics: PolicyMetrics) -> Table:
    """The main table: one line a row, one column a set."""
    sets = sides_of(metrics)
    columns = ("row", "strength", *(f"{set_title(name, side)}{WANTED.get(side, '')}" for name, side in sets.items()))
    rows = tuple((_name(row.name), strength_cell(row), *(rate_cell(refused(row, s)) for s in sets)) for row in metrics.rows)
    return Table(columns, rows)


def utility_of_weights(found: Utility) -> Table:
    """Benchmark scores under base and edit; edited weights have no gate, so its two columns are left out."""
    whole = utility_of_gates(found)
    kept = [i for i, column in enumerate(whole.columns) if not column.startswith("gate")]
    return Table(tuple(whole.columns[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in whole.rows))


def policy_table(metrics: PolicyMetrics) -> RichTable:
    """The main table for a terminal of 80 columns: a side with several sets is shown by their lowest and highest rate."""
    title = (
        f"{metrics.run}: {shown_model(metrics.model)}, category {metrics.category}, seed {metrics.seed}, "
        f"judge {metrics.judge}; refused, %"
    )
    # Text, not str: rich would read the brackets of a name as markup.
    shown = RichTable(title=Text(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column(Text("row"), overflow="fold")
    sides: dict[str, list[str]] = {}
    for name, side in sides_of(metrics).items():
        sides.setdefault(side, []).append(name)
    for side, names in sides.items():
        several = f"\n{len(names)} sets" if len(names) > 1 else ""
        shown.add_column(Text(f"{side}{WANTED.get(side, '')}{several}"), justify="right", overflow="fold")
    for row in metrics.rows:
        name = row.name if row.strength is None else f"{row.name}\nat {row.strength:g}"
        shown.add_row(Text(name), *(Text(_span([refused(row, s) for s in names])) for names in sides.values()))
    return shown


def _span(rates: Sequence[Rate | None]) -> str:
    """One rate with its interval below; of several, the lowest and the highest."""
    if len(rates) == 1:
        return rate_text(rates[0]).replace(" [", "\n[")
    known = [rate.rate for rate in rates if rate is not None and rate.rate is not None]
    if not known:
        return missing()
    left_out = len(rates) - len(known)
    return f"{percent(min(known))} to {percent(max(known))}" + (f"\n{left_out} of them n/a" if left_out else "")


def against_base(metrics: PolicyMetrics) -> Table:
    """Every row against the base on the same prompts, set by set."""
    rows = []
    for row, name, found in _row_by_set(metrics):
        paired = found.against_base
        if paired is None:
            continue
        rows.append(
            (
                _name(row.name),
                _set_cell(metrics, name),
                Cell(found.side, found.side),
                Cell(str(paired.n), paired.n),
                count_cell(paired.only_row if paired.n else None),
                count_cell(paired.only_reference if paired.n else None),
                difference_cell(paired),
                Cell(missing()) if paired.p is None else Cell(f"{paired.p:.2g}", paired.p),
            )
        )
    columns = ("row", "set", "side", "n", "only row refuses", "only base refuses", "difference pp [CI]", "p")
    return Table(columns, tuple(rows))


def answers(metrics: PolicyMetrics) -> Table:
    """What the answers were that were not refusals: broken, or judged HARMFUL."""
    columns = ("row", "set", "side", "refused % [CI]", "broken % [CI]", "HARMFUL % [CI]")
    return Table(
        columns,
        tuple(
            (
                _name(row.name),
                _set_cell(metrics, name),
                Cell(found.side, found.side),
                rate_cell(found.refused),
                rate_cell(found.broken),
                rate_cell(found.harmful),
            )
            for row, name, found in _row_by_set(metrics)
        ),
    )


def strengths(metrics: PolicyMetrics) -> Table:
    """Every strength tried on the calibration split."""
    columns = (
        "row", "strength", "category refused ↑ % [CI]", "benign refused ↓ % [CI]", "benign broken ↓ % [CI]",
        "(k+1)/(n+1) within limit", "chosen",
    )  # fmt: skip
    return Table(
        columns,
        tuple(
            (
                _name(name),
                Cell(f"{point.strength:g}", point.strength),
                rate_cell(point.category_refused),
                rate_cell(point.benign_refused),
                rate_cell(point.benign_broken),
                _within_cell(point.benign_refused, metrics.over_refusal_limit),
                _name("yes" if point.chosen else "no"),
            )
            for name, points in metrics.frontier.items()
            for point in sorted(points, key=lambda p: p.strength)
        ),
    )


def layers(metrics: PolicyMetrics) -> Table:
    """The circuit and its edit, layer by layer."""
    columns = ("layer", "mean score, all", "mean score, chosen", "chosen channels", "norm of α·Δθ")
    return Table(
        columns,
        tuple(
            (
                count_cell(layer.layer),
                _number(layer.mean_score),
                _number(layer.chosen_score),
                count_cell(layer.chosen),
                _number(layer.delta_norm),
            )
            for layer in metrics.layers
        ),
    )


def pairs(metrics: PolicyMetrics) -> Table:
    """How many contrastive pairs each part of the run had."""
    return Table(("pairs", "n"), tuple((_name(part), count_cell(n)) for part, n in metrics.pairs.items()))


def sides_of(metrics: PolicyMetrics) -> dict[str, str]:
    """Set -> side, over all rows: the category first, then benign prompts, other categories, and further prompts."""
    found = {name: rates.side for row in metrics.rows for name, rates in row.sets.items()}
    return dict(sorted(found.items(), key=lambda item: (*SIDES, item[1]).index(item[1])))


def set_of(metrics: PolicyMetrics, side: str) -> str | None:
    """The first set of a side, None where a run has none."""
    return next((name for name, found in sides_of(metrics).items() if found == side), None)


def set_title(name: str, side: str) -> str:
    return side if name == side else f"{readable(name)} ({side})"


def readable(name: str) -> str:
    """A set's name as a heading, which must break where it is too long for its column."""
    return name.replace("_", " ")


def size_of(metrics: PolicyMetrics, name: str) -> str:
    """The n of a set; all that there are, should rows have been measured on different numbers of prompts."""
    sizes = {row.sets[name].refused.n for row in metrics.rows if name in row.sets}
    return "/".join(map(str, sorted(sizes)))


def row_named(metrics: PolicyMetrics, name: str) -> PolicyRow | None:
    return next((row for row in metrics.rows if row.name == name), None)


def edited_row(metrics: PolicyMetrics) -> PolicyRow | None:
    """The row that the run is about: C-ΔΘ's, or the first learned one if a variant goes by a name of its own."""
    return row_named(metrics, EDITED) or next((row for row in metrics.rows if row.kind == "learned"), None)


def refused(row: PolicyRow | None, name: str | None) -> Rate | None:
    """None where there is no such row, or no such set in it."""
    return row.sets[name].refused if row is not None and name in row.sets else None


def chosen_point(metrics: PolicyMetrics, name: str) -> FrontierPoint | None:
    return next((point for point in metrics.frontier.get(name, []) if point.chosen), None)


def strength_cell(row: PolicyRow) -> Cell:
    return Cell("n/a") if row.strength is None else Cell(f"{row.strength:g}", row.strength)


def _within_cell(refused: Rate, limit: float) -> Cell:
    expected = expected_over_refusal(refused)
    return Cell(missing()) if expected is None else _name("yes" if expected <= limit else "no")


def _row_by_set(metrics: PolicyMetrics) -> Iterable[tuple[PolicyRow, str, SetRates]]:
    return ((row, name, row.sets[name]) for row in metrics.rows for name in sides_of(metrics) if name in row.sets)


def _set_cell(metrics: PolicyMetrics, name: str) -> Cell:
    # Sorted by place, not by name: the category first is the order of every table and figure.
    return Cell(name, list(sides_of(metrics)).index(name))


def _name(text: str) -> Cell:
    return Cell(text, text)


def _number(value: float | None) -> Cell:
    return Cell("n/a") if value is None else Cell(f"{value:.3g}", value)
