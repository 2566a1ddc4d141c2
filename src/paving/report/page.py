"""One self-contained HTML page for a run: what was found, in plain words, pictures, tables and examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from paving.evaluation.comparison import Comparison
from paving.evaluation.diagnostics.records import Diagnostics
from paving.evaluation.judges import Label
from paving.evaluation.results import Metrics, OracleGapIntervals, Rate, Row
from paving.evaluation.shift import Shifted
from paving.evaluation.utility import Utility
from paving.prompts.types import Bucket
from paving.report import figures, tables
from paving.report.comparison import comparison_section
from paving.report.diagnostics import diagnostics_section
from paving.report.examples import Example, SideBySide, redact, side_by_side
from paving.report.shift import shift_section
from paving.report.tables import percent, points
from paving.report.templates import fill, write_atomically, write_page


def write_report(
    metrics: Metrics,
    path: Path,
    *,
    examples: Sequence[Example] = (),
    title: str | None = None,
    diagnostics: Diagnostics | None = None,
    utility: Utility | None = None,
    comparison: Comparison | None = None,
    comparison_examples: Sequence[Example] = (),
    shift: Sequence[Shifted] | None = None,
) -> Path:
    """Write the page of a run to `path`, which holds either the old page or the whole new one, never a part of it."""
    page = render(
        metrics, examples=examples, title=title, diagnostics=diagnostics, utility=utility,
        comparison=comparison, comparison_examples=comparison_examples, shift=shift,
    )  # fmt: skip
    return write_page(page, path)


def write_picture(metrics: Metrics, path: Path) -> Path:
    """Write the main picture alone, for a README: `.png` or `.svg`, by the suffix of `path`."""
    path = Path(path)
    file_format = path.suffix.lower().removeprefix(".")
    if file_format not in {"png", "svg"}:
        raise ValueError(f"cannot draw a picture as {path.name!r}: its suffix must be .png or .svg")
    return write_atomically(path, figures.picture(metrics, file_format))


def render(
    metrics: Metrics,
    *,
    examples: Sequence[Example] = (),
    title: str | None = None,
    diagnostics: Diagnostics | None = None,
    utility: Utility | None = None,
    comparison: Comparison | None = None,
    comparison_examples: Sequence[Example] = (),
    shift: Sequence[Shifted] | None = None,
) -> str:
    """The source of the page. HARMFUL texts are gone before the template sees anything."""
    return fill(
        "page.html.j2",
        title=title or f"{metrics.run}: selective refusal editing of {tables.model_name(metrics)}",
        model=tables.model_name(metrics),
        metrics=metrics,
        finding=finding(metrics),
        failures=failures(metrics),
        gaps=oracle_gaps(metrics),
        operating_point=operating_point(metrics),
        figures={
            "three_way": Markup(figures.three_way(metrics)),
            "trade_off": Markup(figures.trade_off(metrics)),
            "gates": Markup(figures.gate_histograms(metrics)),
            "reliability": Markup(figures.reliability(metrics)),
            "training": Markup(figures.training_curves(metrics)),
        },
        diagnostics=diagnostics and diagnostics_section(diagnostics),
        diagnostics_judge=diagnostics and diagnostics.judge,
        utility=utility and tables.utility(utility),
        comparison=comparison and comparison_section(comparison, redact(comparison_examples)),
        shift=shift and shift_section(shift),
        three_way=tables.three_way(metrics),
        labels=tables.label_counts(metrics),
        against=tables.against_references(metrics),
        gates=tables.gates(metrics),
        buckets=tables.bucket_counts(metrics),
        filters=tables.filter_counts(metrics),
        example_groups=group_examples(redact(examples), metrics),
    )


def group_examples(examples: Sequence[Example], metrics: Metrics) -> list[tuple[str, list[SideBySide]]]:
    """(bucket name, prompts with their completions), buckets and rows in the order of the tables."""
    names = [row.name for row in metrics.rows]
    groups = []
    for bucket in Bucket:
        sides = side_by_side([example for example in examples if example.bucket == bucket], names)
        if sides:
            groups.append((tables.BUCKET_NAMES[bucket], sides))
    return groups


def finding(metrics: Metrics) -> str:
    """The run in one sentence. Harmful refusal is named whatever it did: it is the price of an edit."""
    base, learned, oracle = _row(metrics, "reference"), _row(metrics, "learned"), _row(metrics, "diagnostic")
    if base is None or learned is None:
        return "This run has no base row and learned row to compare, so it shows no effect of an intervention."
    parts = [
        f"With the {learned.name} gate, edit refusal {_went(base, learned)}",
        f"harmful refusal {_moved(base, learned)}",
    ]
    if oracle is not None:
        parts.append(
            f"{oracle.name} routing, a diagnostic that is told each prompt's bucket, has edit refusal at "
            f"{_share(oracle, Bucket.EDIT)} and harmful refusal at {_share(oracle, Bucket.HARMFUL_KEEP)}"
        )
    return "; ".join(parts) + "."


def failures(metrics: Metrics) -> str:
    """The edits that no longer refuse and are failures all the same."""
    learned = _row(metrics, "learned")
    counts = learned.labels.get(Bucket.EDIT, {}) if learned else {}
    n = sum(counts.values())
    if not n:
        return "No verdicts on edit prompts were recorded for the learned row: n/a (n=0)."
    return (
        f"Not refusing is not yet success: of the {n} edit prompts under {learned.name}, "
        f"{counts.get(Label.HARMFUL, 0)} were judged HARMFUL and {counts.get(Label.HARMLESS_BROKEN, 0)} BROKEN."
    )


def oracle_gaps(metrics: Metrics) -> str:
    """What is lost to routing, and what editing still owes where every prompt is routed by its bucket."""
    gaps, oracle = metrics.oracle_gaps, _row(metrics, "diagnostic")
    # Eq. 7 counts refusals lost, learned less oracle; what the reader sees move under the oracle is minus that.
    edit = None if gaps.edit is None else -gaps.edit
    limits = gap_limits(metrics.oracle_gap_intervals)
    benign, harmful, refusal = (
        tables.missing() if gap is None else f"{points(gap)} pp{limit}"
        for gap, limit in zip((gaps.route_benign, gaps.route_harmful, edit), limits, strict=True)
    )
    left = _share(oracle, Bucket.EDIT) if oracle else tables.missing()
    return (
        f"Routing: if the gate were told each prompt's bucket, benign preservation would move by {benign}, "
        f"harmful preservation by {harmful} and edit refusal by {refusal}. "
        f"Editing: with every edit prompt routed to it, the editor still leaves {left} of them refused."
    )


def gap_limits(found: OracleGapIntervals | None) -> tuple[str, str, str]:
    """The 95 % limits beside each gap, that of edit refusal turned round with its sign."""
    if found is None:
        return "", "", ""
    benign, harmful, edit = found.route_benign, found.route_harmful, found.edit
    turned = (None, None) if edit.low is None or edit.high is None else (-edit.high, -edit.low)
    pairs = ((benign.low, benign.high), (harmful.low, harmful.high), turned)
    first, second, third = (tables.limits_text(low, high, points) for low, high in pairs)
    return first, second, third


def operating_point(metrics: Metrics) -> str:
    """Gate activity at the chosen threshold."""
    share = figures.active_share(metrics)
    threshold = f"At the chosen threshold (gate logit above {metrics.router.threshold:.3g})"
    if share is None:
        return f"{threshold} gate activity was not recorded: n/a (n=0)."
    shares = {b: f"{percent(share[b])}%" if b in share else tables.missing() for b in Bucket}
    parts = (f"{text} of {tables.BUCKET_NAMES[bucket]} prompts" for bucket, text in shares.items())
    return f"{threshold} the gate is open, before any veto, on {', '.join(parts)}."


def _row(metrics: Metrics, kind: str) -> Row | None:
    """The first row of a kind; the plain name wins, so that "learned" speaks before "learned+veto"."""
    plain = {"reference": "base", "learned": "learned", "diagnostic": "oracle"}[kind]
    rows = [row for row in metrics.rows if row.kind == kind]
    return next((row for row in rows if row.name == plain), rows[0] if rows else None)


def _share(row: Row, bucket: Bucket) -> str:
    rate = row.refusal.get(bucket)
    return f"{percent(rate.rate)}%" if _measured(rate) else tables.missing(rate.n if rate else 0)


def _went(base: Row, learned: Row) -> str:
    if not (_measured(base.refusal.get(Bucket.EDIT)) and _measured(learned.refusal.get(Bucket.EDIT))):
        return f"could not be compared with the base: {tables.missing()}"
    return f"went from {_share(base, Bucket.EDIT)} to {_share(learned, Bucket.EDIT)}"


def _moved(base: Row, learned: Row) -> str:
    if learned.harmful_drift is None:
        return f"could not be compared with the base: {tables.drift_cell(learned).text}"
    from_to = f"from {_share(base, Bucket.HARMFUL_KEEP)} to {_share(learned, Bucket.HARMFUL_KEEP)}"
    n = learned.refusal[Bucket.HARMFUL_KEEP].n if Bucket.HARMFUL_KEEP in learned.refusal else 0
    return f"moved by {points(learned.harmful_drift)} pp ({from_to}, n={n})"


def _measured(rate: Rate | None) -> bool:
    return rate is not None and rate.rate is not None
