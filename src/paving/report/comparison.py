"""The comparators' part of a run's page: what the comparison says, its tables, and the same for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from paving.evaluation.comparison import BASE, OWN, ComparedRow, Comparison, Objective, Rule, SweepFigures
from paving.evaluation.results import PairedRates
from paving.prompts.types import Bucket
from paving.report import comparison_figures
from paving.report.examples import Example, side_by_side
from paving.report.tables import (
    BUCKET_NAMES,
    Cell,
    Table,
    count_cell,
    difference_cell,
    drift_cell,
    missing,
    percent,
    points,
    preservation_cell,
    rate_cell,
    rate_text,
)

ORACLE = "oracle"
DEPLOYED = ("learned+veto", "learned")  # gates of the run's own
NOTHING = "none passes: n/a"
SHOWN = {BASE: "base", OWN: "Residual Paving"}


def comparison_section(found: Comparison, examples: Sequence[Example]) -> dict[str, object]:
    """What the template shows. examples: redacted already."""
    return {
        "finding": finding(found),
        "figure": Markup(comparison_figures.trade_off(found)),
        "caption": caption(found),
        "rows": rows_table(found),
        "benign": benign_table(found),
        "against": against_base(found),
        "rules": rules_text(found),
        "strict": strict_text(found),
        "choices": choices_table(found),
        "sweeps": sweeps_table(found),
        "sweep_caption": sweep_caption(found),
        "methods": methods_text(found),
        "notes": found.notes,
        "examples": example_groups(examples, rows_to_show(found)),
    }


def main_objective(found: Comparison) -> Objective:
    return "three" if "three" in found.objectives else "two"


def rows_to_show(found: Comparison) -> list[str]:
    """The base, and for each method the row of its first variant that the control rule took: names, for examples."""
    rule, names = f"control/{main_objective(found)}", {}
    for r in found.rows:
        if rule in r.chosen_by:
            names.setdefault(r.method, r.row.name)
    return ["base", *names.values()]


def example_groups(examples: Sequence[Example], names: Sequence[str]) -> list[tuple[str, list]]:
    groups = ((BUCKET_NAMES[b], side_by_side([e for e in examples if e.bucket == b], names)) for b in Bucket)
    return [(name, sides) for name, sides in groups if sides]


def finding(found: Comparison) -> str:
    """What the comparison says of Residual Paving, in plain words, including which comparators are as good: by each rule,
    since a scale that another rule took is another method's choice."""
    return " ".join(_finding(found, rule) for rule in ("control", "strict"))


def _finding(found: Comparison, rule: Rule) -> str:
    taken = f"{rule}/{main_objective(found)}"
    rows = [r for r in found.rows if taken in r.chosen_by and r.variant != ORACLE]
    own = next((r for r in rows if r.method == OWN and r.variant in DEPLOYED and _measured(r)), None)
    others = [r for r in rows if r.method not in SHOWN and _measured(r)]
    by = f"By the {rule} {'score' if rule == 'control' else 'limits'}"
    if own is None:
        return f"{by} there is no measured Residual Paving row to compare with: n/a (n=0)."
    as_good = [
        r for r in others
        if r.edit_success.rate >= own.edit_success.rate and r.row.harmful_drift >= own.row.harmful_drift
        and _benign(r) >= _benign(own)
    ]  # fmt: skip
    said = f"{by} Residual Paving ({own.variant}, scale {own.scale:g}) answers {_short(own)}."
    if not others:
        return f"{said} No comparator row was measured beside it: n/a (n=0)."
    counts = "in edits, drift and benign preservation"
    if not as_good:
        return f"{said} None of {len(others)} comparator rows that could be deployed is as good {counts}."
    best = max(as_good, key=lambda r: (r.edit_success.rate, r.row.harmful_drift))
    return (
        f"{said} Of {len(others)} comparator rows that could be deployed, {len(as_good)} "
        f"{'is' if len(as_good) == 1 else 'are'} at least as good {counts}; the best of them, {best.row.name}, "
        f"answers {_short(best)}. These are point estimates: the table has their intervals."
    )


def _benign(r: ComparedRow) -> float:
    return r.row.preservation[Bucket.BENIGN_KEEP].value or 0.0


def _short(r: ComparedRow) -> str:
    return (
        f"{r.edit_success.k} of {r.edit_success.n} edit prompts ({percent(r.edit_success.rate)}%) "
        f"and moves harmful refusal by {points(r.row.harmful_drift)} pp"
    )


def _measured(r: ComparedRow) -> bool:
    return r.edit_success.rate is not None and r.row.harmful_drift is not None


def caption(found: Comparison) -> str:
    return (
        "Edit success against what happened to the refusals of harmful prompts, on the held-out split; the upper right end "
        "is wanted. One mark for each method (colour) and variant (shape), at the scale that the baseline control score "
        f"(above) or the strict limits (below) take for {main_objective(found)} objectives; hollow marks are told each "
        "prompt's bucket and cannot be deployed. Large marks are Residual Paving at the scale of its training, ringed ones "
        "at the scale that the rule takes for it. Bars: 95% intervals, Wilson's upwards, paired on the same prompts "
        "sideways. Shaded: drift that the strict rule allows."
    )


def rows_table(found: Comparison) -> Table:
    columns = (
        "method", "variant", "scale", "chosen by", "edit success ↑ % [CI]", "edit refusal ↓ % [CI]", "benign pres. ↑ % [CI]",
        "harmful pres. ↑ % [CI]", "harmful refusal ↑ % [CI]", "harm Δ → 0 pp [CI]",
    )  # fmt: skip
    rows = tuple(
        (
            *_name_cells(r),
            _chosen_cell(r, found.objectives),
            rate_cell(r.edit_success),
            rate_cell(r.row.refusal.get(Bucket.EDIT)),
            preservation_cell(r.row, Bucket.BENIGN_KEEP),
            preservation_cell(r.row, Bucket.HARMFUL_KEEP),
            rate_cell(r.row.refusal.get(Bucket.HARMFUL_KEEP)),
            drift_cell(r.row),
        )
        for r in found.rows
    )
    return Table(columns, rows)


def benign_table(found: Comparison) -> Table:
    columns = (
        "method", "variant", "scale", "same label % [CI]", "label not worse % [CI]", "ROUGE-L", "chrF", "BERTScore",
        "edit: ROUGE-L", "edit: chrF",
    )  # fmt: skip
    rows = tuple(
        (
            *_name_cells(r),
            rate_cell(r.benign.label_agreement),
            rate_cell(r.benign.non_worse),
            _hundred(r.benign.rouge_l, 100, r),
            _hundred(r.benign.chrf, 1, r),
            _hundred(r.benign.bert_score, 100, r),
            _to_target(r.target and r.target.rouge_l, 100),
            _to_target(r.target and r.target.chrf, 1),
        )
        for r in found.rows
    )
    return Table(columns, rows)


def _to_target(value: float | None, factor: int) -> Cell:
    return Cell("n/a") if value is None else Cell(f"{factor * value:.1f}", value)


def _hundred(value: float | None, factor: int, r: ComparedRow) -> Cell:
    if value is None:
        n = r.benign.label_agreement.n
        return Cell("n/a" if n else missing(n))  # not measured, or nothing to measure
    return Cell(f"{factor * value:.1f}", value)


def against_base(found: Comparison) -> Table:
    columns = ("method", "variant", "scale", "what", "n", "only row", "only base", "difference pp [CI]", "p")
    rows = []
    for r in found.rows:
        compared: tuple[tuple[str, PairedRates | None], ...] = (
            ("edit success", r.success_against_base),
            *((f"refusal, {BUCKET_NAMES[b]}", r.row.against_base.get(b)) for b in Bucket),
        )
        for what, paired in compared:
            if paired is not None:
                rows.append(
                    (
                        *_name_cells(r),
                        Cell(what, what),
                        Cell(str(paired.n), paired.n),
                        count_cell(paired.only_row if paired.n else None),
                        count_cell(paired.only_reference if paired.n else None),
                        difference_cell(paired),
                        Cell(missing()) if paired.p is None else Cell(f"{paired.p:.2g}", paired.p),
                    )
                )
    return Table(columns, tuple(rows))


def rules_text(found: Comparison) -> str:
    limits = found.limits
    return (
        "control: the largest edit success + 0.10 · benign preservation + 0.10 · min(1, harmful refusal / the base's); two "
        "objectives leave the last term out. strict: the largest edit success among scales with benign preservation at "
        f"least {percent(limits.benign_preservation)} and, for three objectives, harmful preservation at least "
        f"{percent(limits.harmful_preservation)} and a harmful drift of at least {points(limits.harmful_drift)} pp, "
        "or of one refusal where that is more. The gentler scale among equals. Residual Paving's own rows are at the scale "
        "that was chosen when it was trained; the table says which one these rules take for it, and what that does."
    )


def choices_table(found: Comparison) -> Table:
    """One line for each method and variant, one column for each rule."""
    rules = list(dict.fromkeys((c.rule, c.objective) for c in found.choices))
    scales = {(c.method, c.variant, c.rule, c.objective): c.scale for c in found.choices}

    def taken(scale: float | None) -> Cell:
        return Cell(NOTHING) if scale is None else Cell(f"{scale:g}", scale)

    rows = tuple(
        (Cell(m, m), Cell(v, v), *(taken(scales[m, v, rule, objective]) for rule, objective in rules))
        for m, v in dict.fromkeys((c.method, c.variant) for c in found.choices)
    )
    return Table(("method", "variant", *(f"{rule}, {objective} objectives" for rule, objective in rules)), rows)


def strict_text(found: Comparison) -> str:
    """How often the strict rule found nothing to take; the table of choices says where."""
    strict = [c for c in found.choices if c.rule == "strict"]
    nothing = sum(c.scale is None for c in strict)
    return f"The strict rule found no scale that passes for {nothing} of {len(strict)} choices; those rows are n/a."


def sweeps_table(found: Comparison) -> Table:
    columns = (
        "method", "variant", "scale", "edit success % [CI]", "edit refusal %", "broken %", "HARMFUL %", "benign pres. %",
        "harmful pres. %", "harmful refusal % [CI]", "harm Δ pp",
        *(f"control, {o}" for o in found.objectives), *(f"strict, {o}" for o in found.objectives),
    )  # fmt: skip
    return Table(columns, tuple(_sweep_row(p, found.objectives) for p in found.sweeps))


def _sweep_row(p: SweepFigures, objectives: Sequence[Objective]) -> tuple[Cell, ...]:
    def share(value: float | None, n: int) -> Cell:
        return Cell(missing(n)) if value is None else Cell(percent(value), value)

    return (
        Cell(p.method, p.method),
        Cell(p.variant, p.variant),
        Cell(f"{p.scale:g}", p.scale),
        rate_cell(p.edit_success),
        *(share(r.rate, r.n) for r in (p.edit_refusal, p.edit_broken, p.edit_harmful)),
        *(share(s.value, s.n) for s in (p.benign_preservation, p.harmful_preservation)),
        rate_cell(p.harmful_refusal),
        Cell(missing()) if p.harmful_drift is None else Cell(points(p.harmful_drift), p.harmful_drift),
        *(Cell("n/a") if p.control[o] is None else Cell(f"{p.control[o]:.3f}", p.control[o]) for o in objectives),
        *(Cell("passes" if p.passes[o] else "no", float(p.passes[o])) for o in objectives),
    )


def sweep_caption(found: Comparison) -> str:
    sizes = ", ".join(f"{found.calibration.get(b.value, 0)} {BUCKET_NAMES[b]}" for b in Bucket)
    return (
        f"Calibration split ({sizes} prompts). Each scale was decoded once with every gate open; a variant takes a prompt's "
        "open answer where its gate opens and the base's own elsewhere. Residual Paving was decoded under its own gates, "
        "which may be soft, once for each variant."
    )


def methods_text(found: Comparison) -> list[tuple[str, str]]:
    def text(scales: Sequence[float]) -> str:
        return ", ".join(f"{s:g}" for s in scales)

    lines = []
    for m in found.methods:
        said = [f"could not be fitted: {m.failed}"] if m.failed else [f"scales {text(m.scales)}"]
        if m.left_out and not m.failed:
            said.append(f"{text(m.left_out)} left out, since nearly every edit answer was broken already")
        lines.append((m.name, "; ".join([*said, m.note] if m.note else said)))
    return lines


def comparison_table(found: Comparison) -> RichTable:
    """The main table for a terminal."""
    title = Text(f"{found.run}: comparators, seed {found.seed}, judge {found.judge}; percent")
    shown = RichTable(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, heading in enumerate(("row", "edit success ↑", "benign\npres. ↑", "harm Δ → 0", "chosen by")):
        shown.add_column(Text(heading), justify="right" if 0 < i < 4 else "left", overflow="fold")
    for r in found.rows:
        benign = r.row.preservation.get(Bucket.BENIGN_KEEP)
        cells = (
            r.row.name,
            rate_text(r.edit_success).replace(" [", "\n["),
            missing(benign.n if benign else 0) if benign is None or benign.value is None else percent(benign.value),
            drift_cell(r.row).text.replace(" [", "\n["),
            _chosen_cell(r, found.objectives).text,
        )
        shown.add_row(*map(Text, cells), style="dim" if r.variant == ORACLE else None)
    return shown


def nothing_passes(found: Comparison) -> list[str]:
    """What the strict rule found no scale for, a line each."""
    return [
        f"strict, {c.objective} objectives: no scale of {c.method} ({c.variant}) passes, n/a"
        for c in found.choices
        if c.rule == "strict" and c.scale is None
    ]


def _name_cells(r: ComparedRow) -> tuple[Cell, Cell, Cell]:
    name = SHOWN.get(r.method, r.method)
    shown = f"{name} *" if r.notes else name  # what it is stands below the table, and must not be missed above
    variant = "" if r.method == BASE else r.variant
    return Cell(shown, name), Cell(variant, variant), Cell("") if r.scale is None else Cell(f"{r.scale:g}", r.scale)


def _chosen_cell(r: ComparedRow, objectives: Sequence[Objective]) -> Cell:
    """`control, strict`; with both objectives asked for, `control (two, three), strict (three)`."""
    taken: dict[str, list[str]] = {}
    for rule, _, objective in (chosen.partition("/") for chosen in r.chosen_by):
        taken.setdefault(rule, []).append(objective)
    several = len(objectives) > 1
    text = ", ".join(f"{rule} ({', '.join(found)})" if several else rule for rule, found in taken.items())
    return Cell(text, text or None)
