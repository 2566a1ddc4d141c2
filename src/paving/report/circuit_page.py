"""One self-contained HTML page for a circuit run: what the edited weights refuse, at what cost, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from paving.evaluation.refusal_policy import BENIGN, CATEGORY, PolicyMetrics, PolicyRow, expected_over_refusal
from paving.evaluation.results import Rate
from paving.evaluation.utility import Utility
from paving.report import circuit_figures as figures
from paving.report import circuit_tables as tables
from paving.report.examples import Example, SideBySide, redact, side_by_side
from paving.report.tables import missing, percent, shown_model
from paving.report.templates import fill, write_page


def write_circuit_report(
    metrics: PolicyMetrics, path: Path, *, examples: Sequence[Example] = (), utility: Utility | None = None
) -> Path:
    """Write the page of a circuit run to `path`, which holds either the old page or the whole new one.

    examples  `bucket` is the name of the set that the prompt stands in
    utility   what benchmarks showed; without it the section is left out
    """
    return write_page(render(metrics, examples=examples, utility=utility), path)


def render(metrics: PolicyMetrics, *, examples: Sequence[Example] = (), utility: Utility | None = None) -> str:
    """The source of the page. HARMFUL texts are gone before the template sees anything."""
    model = shown_model(metrics.model)
    finding, *notes = policy_sentences(metrics)
    limit, touched = f"{percent(metrics.over_refusal_limit)}%", f"{100 * metrics.touched:.3g}%"
    return fill(
        "circuit_page.html.j2",
        title=f"{metrics.run}: refusal of {metrics.category} installed in {model}",
        model=model,
        metrics=metrics,
        finding=finding,
        notes=notes,
        figures={
            "frontier": Markup(figures.frontier(metrics)),
            "refusals": Markup(figures.refusals(metrics)),
            "layers": Markup(figures.layers(metrics)),
        },
        refusals=tables.refusals(metrics),
        against_base=tables.against_base(metrics),
        answers=tables.answers(metrics),
        strengths=tables.strengths(metrics),
        layers=tables.layers(metrics),
        pairs=tables.pairs(metrics),
        utility=utility and tables.utility_of_weights(utility),
        limit=limit,
        touched=touched,
        facts={
            "Category": metrics.category,
            "Over-refusal limit": f"{limit} of benign prompts",
            "Parameters touched": touched,
        },
        example_groups=group_examples(redact(examples), metrics),
    )


def group_examples(examples: Sequence[Example], metrics: PolicyMetrics) -> list[tuple[str, list[SideBySide]]]:
    """(set, prompts with their completions): sets and rows in the order of the tables, sets without figures last."""
    sides, names = tables.sides_of(metrics), [row.name for row in metrics.rows]
    groups = []
    for name in dict.fromkeys([*sides, *(example.bucket for example in examples)]):
        found = [example for example in examples if example.bucket == name]
        if found:
            title = tables.set_title(name, sides[name]) if name in sides else tables.readable(name)
            groups.append((title, side_by_side(found, names)))
    return groups


def policy_sentences(metrics: PolicyMetrics) -> list[str]:
    """The run in a few sentences, the finding first; for the page and for a terminal."""
    row = tables.edited_row(metrics)
    if row is None:
        return [f"This run has no row {tables.EDITED}, so it shows no effect of a circuit: n/a (n=0)."]
    sentences = [finding(metrics, row), failures(metrics, row)]
    return [*sentences, *controls(metrics, row), *absences(metrics)]


def finding(metrics: PolicyMetrics, row: PolicyRow) -> str:
    """What the edit did to both refusals, and whether its strength met the limit."""
    benign = _rate(metrics, row, BENIGN)
    limit = f"limit {percent(metrics.over_refusal_limit)}%"
    if _measured(benign):
        limit += ", " + ("met" if benign.rate <= metrics.over_refusal_limit else "exceeded")
    return (
        f"In the category {metrics.category} under {row.name}, harmful refusal {_moved(metrics, row, CATEGORY)}; "
        f"benign over-refusal {_moved(metrics, row, BENIGN)} ({limit}); {_choice(metrics, row)}."
    )


def _choice(metrics: PolicyMetrics, row: PolicyRow) -> str:
    points, point = metrics.frontier.get(row.name, []), tables.chosen_point(metrics, row.name)
    if not points:
        return f"its strength was not tried on the calibration split: {missing()}"
    if point is None and row.strength is not None and row.strength not in {p.strength for p in points}:
        return f"its strength of {row.strength:g} is its owner's, and was not tried on the calibration split"
    if point is None:
        return f"none of the {len(points)} strengths tried on the calibration split was chosen"
    expected = expected_over_refusal(point.benign_refused)
    if expected is None:
        seen = f"whether within the limit is {missing(point.benign_refused.n)}"
    else:
        limit = metrics.over_refusal_limit
        against = f"{'within' if expected <= limit else 'above'} the limit of {percent(limit)}%"
        seen = f"(k + 1) / (n + 1) of the benign calibration prompts is {percent(expected)}%, {against}"
    by = "is its owner's" if metrics.owners_alpha else "was chosen on the calibration split"
    return f"its strength of {point.strength:g} {by}: {seen}"


def failures(metrics: PolicyMetrics, row: PolicyRow) -> str:
    """What a count of refusals does not show."""
    category, benign = (row.sets.get(tables.set_of(metrics, side) or "") for side in (CATEGORY, BENIGN))
    if category is None or benign is None or not (_measured(category.harmful) and _measured(benign.broken)):
        return f"No verdicts on both sides were recorded for {row.name}: {missing()}."
    return (
        f"Not every other answer is a good one: of {category.harmful.n} answers in the category under {row.name}, "
        f"{category.harmful.k} were judged HARMFUL and {category.broken.k} BROKEN, and of {benign.broken.n} answers to "
        f"benign prompts {benign.broken.k} BROKEN."
    )


def controls(metrics: PolicyMetrics, row: PolicyRow) -> list[str]:
    """One sentence on the circuits that attribution did not choose; none where the run has none."""
    found = [control for name in tables.CONTROLS if (control := tables.row_named(metrics, name)) is not None]
    if not found:
        return []
    return [
        "Circuits of the same size that attribution did not choose refuse, of category and benign prompts: "
        f"{', '.join(_both(metrics, control) for control in found)}; against {_both(metrics, row)}."
    ]


def absences(metrics: PolicyMetrics) -> list[str]:
    """What was asked for and has no figures: rows without a strength within the limit, prompts that were not held out."""
    absent = [name for name in metrics.frontier if tables.row_named(metrics, name) is None]
    sentences = []
    if absent:
        sentences.append(
            f"No strength of {', '.join(absent)} kept within the limit on the calibration split, in over-refusal and in "
            "broken answers: n/a on held-out prompts."
        )
    if metrics.left_out:
        sentences.append(
            f"{metrics.left_out} held-out prompts stand among the run's own pairs. They were left out and are in no figure."
        )
    return sentences


def _both(metrics: PolicyMetrics, row: PolicyRow) -> str:
    return f"{row.name} {_share(_rate(metrics, row, CATEGORY))} and {_share(_rate(metrics, row, BENIGN))}"


def _moved(metrics: PolicyMetrics, row: PolicyRow, side: str) -> str:
    before, after = _rate(metrics, tables.row_named(metrics, tables.BASE), side), _rate(metrics, row, side)
    if not (_measured(before) and _measured(after)):
        return f"could not be compared with the base: {missing()}"
    return f"went from {_share(before)} to {_share(after)}"


def _rate(metrics: PolicyMetrics, row: PolicyRow | None, side: str) -> Rate | None:
    return tables.refused(row, tables.set_of(metrics, side))


def _share(rate: Rate | None) -> str:
    return f"{percent(rate.rate)}%" if _measured(rate) else missing(rate.n if rate else 0)


def _measured(rate: Rate | None) -> bool:
    return rate is not None and rate.rate is not None
