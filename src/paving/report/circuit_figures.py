"""The pictures of a circuit run, one function each: from the metrics to an SVG that stands inline in a page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from paving.evaluation.refusal_policy import BENIGN, CATEGORY, FrontierPoint, PolicyMetrics
from paving.evaluation.results import Rate
from paving.prompts.types import Bucket
from paving.report import circuit_tables as tables
from paving.report.figures import beside, nothing, percents, whisker
from paving.report.svg import COLOURS, INK, MUTED, OCHRE, PURPLE, inline, new_figure
from paving.report.tables import percent

BLUE, GREEN, VERMILION = (COLOURS[bucket] for bucket in Bucket)
LOOKS = (
    (BLUE, "o"), (VERMILION, "s"), (GREEN, "^"), (PURPLE, "D"), (OCHRE, "v"), (MUTED, "X"), (INK, "P"),
)  # fmt: skip
DASHES = ("-", "--", ":")
LIMIT = {"color": INK, "linewidth": 1.2, "linestyle": (0, (4, 3))}
ALIKE = {"color": MUTED, "linewidth": 1, "linestyle": (0, (1, 3))}
RING = {"marker": "o", "mfc": "none", "mec": INK, "mew": 1.5, "ms": 11}
STAR = {"marker": "*", "color": INK, "ms": 12, "linestyle": "none"}


def frontier(metrics: PolicyMetrics) -> str:
    """What refusing the category costs in benign refusals, a curve a row: the main picture."""
    description = "Refusal of the category against benign over-refusal, a curve a row over its strengths"
    return inline(_draw_frontier, metrics, "frontier", description)


def refusals(metrics: PolicyMetrics) -> str:
    """Refusal of every row on every set of held-out prompts."""
    return inline(_draw_refusals, metrics, "refusals", "Refusal by set and row, with 95% Wilson intervals")


def layers(metrics: PolicyMetrics) -> str:
    """Attribution, mask and norm of the edit, layer by layer."""
    return inline(_draw_layers, metrics, "layers", "Attribution, chosen channels and norm of the edit, by layer")


def looks_of(metrics: PolicyMetrics) -> dict[str, dict[str, Any]]:
    """Row -> its colour, marker and dashes, the same in every figure; the base has none."""
    names = dict.fromkeys([*(row.name for row in metrics.rows), *metrics.frontier])
    # C-ΔΘ's own first: its look should not depend on which comparators a run has.
    ordered = sorted((name for name in names if name != tables.BASE), key=lambda name: name != tables.EDITED)
    looks = {}
    for i, name in enumerate(ordered):
        colour, marker = LOOKS[i % len(LOOKS)]
        looks[name] = {"color": colour, "marker": marker, "linestyle": DASHES[i // len(LOOKS) % len(DASHES)]}
    return looks


def _draw_frontier(metrics: PolicyMetrics) -> Figure:
    curves = {name: look for name, look in looks_of(metrics).items() if _known(metrics.frontier.get(name, []))}
    base = _base_point(metrics)
    figure = new_figure(height=8 + 0.11 * len(curves))
    whole, near = figure.subplots(2, 1)
    whole.set_title("Strength: what refusing costs (calibration)")
    near.set_title("The same, near the limit")
    if not curves and base is None:
        nothing(whole, "strengths")
        nothing(near, "strengths")
        return figure
    limit = 100 * metrics.over_refusal_limit
    for ax in (whole, near):
        ax.plot([0, 100], [0, 100], **ALIKE)
        ax.axvline(limit, **LIMIT)
        for name, look in curves.items():
            points = sorted(metrics.frontier[name], key=lambda p: p.strength)
            x = percents(p.benign_refused.rate for p in points)
            y = percents(p.category_refused.rate for p in points)
            ax.plot(x, y, ms=4.5, zorder=4 if name == tables.EDITED else 3, **look)
            _mark_chosen(ax, points, look["color"], with_intervals=ax is near)
        if base is not None:
            # A star at 0 reaches over the axis; but one may also lie right of what the lower panel shows.
            ax.plot(100 * base[0], 100 * base[1], zorder=6, clip_on=ax is near, **STAR)
        ax.set(xlim=(-2, 102), ylim=(-3, 103), xlabel="benign prompts refused, %", ylabel="category refused, %")
    width = min(100.0, max(10.0, 3 * limit))
    near.set(xlim=(-0.02 * width, 1.02 * width), ylim=(-3, 112))  # room for the strengths above their points
    _name_strengths(near, metrics, width)
    entries = [(_with_strength(metrics, name), look | {"ms": 5}) for name, look in curves.items()]
    entries += [("chosen", RING | {"ms": 9, "linestyle": "none"})]
    entries += [(f"limit, {percent(metrics.over_refusal_limit)}%", LIMIT), ("refuses both alike", ALIKE)]
    entries += [(base[2], STAR)] if base is not None else []
    near.legend(
        [Line2D([], [], **look) for _, look in entries], [label for label, _ in entries], title="row: chosen strength",
        alignment="left", loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2, columnspacing=1.2, handlelength=2.2,
    )  # fmt: skip
    return figure


def _known(points: Iterable[FrontierPoint]) -> list[FrontierPoint]:
    return [p for p in points if p.category_refused.rate is not None and p.benign_refused.rate is not None]


def _base_point(metrics: PolicyMetrics) -> tuple[float, float, str] | None:
    """(benign refused, category refused, label) of the base, as fractions; None where it was not measured."""
    for points in metrics.frontier.values():
        for point in _known(points):
            if point.strength == 0:  # the base itself, on the split of the curves
                return point.benign_refused.rate, point.category_refused.rate, "base"
    row = tables.row_named(metrics, tables.BASE)
    benign, category = (tables.refused(row, tables.set_of(metrics, side)) for side in (BENIGN, CATEGORY))
    if benign is None or category is None or benign.rate is None or category.rate is None:
        return None
    return benign.rate, category.rate, "base (held-out prompts)"


def _mark_chosen(ax: Axes, points: Sequence[FrontierPoint], colour: str, *, with_intervals: bool) -> None:
    for p in (p for p in _known(points) if p.chosen):
        x, y = 100 * p.benign_refused.rate, 100 * p.category_refused.rate
        ax.plot(x, y, zorder=5, **RING)
        if with_intervals:
            whiskers = {"xerr": whisker(p.benign_refused), "yerr": whisker(p.category_refused)}
            ax.errorbar(x, y, fmt="none", ecolor=colour, elinewidth=1, alpha=0.7, **whiskers)


def _name_strengths(ax: Axes, metrics: PolicyMetrics, width: float) -> None:
    """The strengths of C-ΔΘ's own curve, above its points; those of every curve would cover each other."""
    row = tables.edited_row(metrics)
    for p in _known(metrics.frontier.get(row.name, [])) if row else []:
        x, y = 100 * p.benign_refused.rate, 100 * p.category_refused.rate
        if x <= width:
            above = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center", "zorder": 7}
            ax.annotate(f"{p.strength:g}", (x, y), fontsize=10, **above)


def _with_strength(metrics: PolicyMetrics, name: str) -> str:
    point = tables.chosen_point(metrics, name)
    return f"{_short(name)}: " + ("none chosen" if point is None else f"{point.strength:g}")


def _draw_refusals(metrics: PolicyMetrics) -> Figure:
    sets, looks = tables.sides_of(metrics), looks_of(metrics)
    n_rows = max(1, math.ceil(len(sets) / 2))
    titles = {name: _panel_title(metrics, name, side) for name, side in sets.items()}
    lines = max((title.count("\n") for title in titles.values()), default=0)
    figure = new_figure(height=n_rows * (0.55 + 0.2 * lines + 0.22 * max(1, len(metrics.rows))) + 0.35)
    panels = figure.subplots(n_rows, 2, squeeze=False, sharex=True, sharey=True).flatten()
    for ax in panels[max(1, len(sets)) :]:
        ax.set_visible(False)
    if not sets:
        nothing(panels[0], "prompts")
        return figure
    names = [_short(row.name) for row in metrics.rows]
    ticks = {"yticks": range(len(names)), "yticklabels": names, "xticks": [0, 50, 100]}
    for ax, name in zip(panels, sets, strict=False):
        ax.set_title(titles[name])
        ax.set(xlim=(0, 100), ylim=(len(names) - 0.4, -0.6), **ticks)
        ax.grid(axis="y", visible=False)
        ax.tick_params(length=0)
        ax.tick_params(axis="y", pad=8)  # a marker at 0 reaches over the axis
        for y, row in enumerate(metrics.rows):
            rate = tables.refused(row, name)
            if rate is None or rate.rate is None:
                beside(ax, y, "n/a", MUTED)
                continue
            look = looks.get(row.name, {"color": INK, "marker": "*"})
            _draw_rate(ax, y, rate, look["color"], look["marker"])
        base = tables.refused(tables.row_named(metrics, tables.BASE), name)
        if base is not None and base.rate is not None:
            ax.axvline(100 * base.rate, color=MUTED, linestyle=(0, (3, 3)), linewidth=1)
    for ax in panels[len(sets) - 2 : len(sets)] if len(sets) > 1 else panels[:1]:
        ax.tick_params(labelbottom=True)  # a panel above a hidden one has none of its own otherwise
    figure.supxlabel("refused, % (dashed: base)", fontsize=12)
    return figure


def _panel_title(metrics: PolicyMetrics, name: str, side: str) -> str:
    """The set, and its side and n on a last line; 16 letters are what half the width holds."""
    of = [] if name == side else textwrap.wrap(tables.readable(name), 16, max_lines=2, placeholder="…")
    return "\n".join([*of, f"{side}, n={tables.size_of(metrics, name)}"])


def _draw_rate(ax: Axes, y: float, rate: Rate, colour: str, marker: str) -> None:
    ax.barh(y, 100 * rate.rate, height=0.6, color=colour, alpha=0.25, linewidth=0)
    look = {"fmt": marker, "ms": 4.5, "capsize": 2.5, "color": colour, "clip_on": False}
    ax.errorbar(100 * rate.rate, y, xerr=whisker(rate), **look)
    beside(ax, y, percent(rate.rate))


def _draw_layers(metrics: PolicyMetrics) -> Figure:
    figure = new_figure(height=7.4)
    scores, mask, norms = figure.subplots(3, 1, sharex=True)
    scores.set_title("Attribution: mean score of the channels")
    mask.set_title("Mask: chosen channels")
    norms.set_title("Edit: norm of α·Δθ")
    if not metrics.layers:
        for ax, what in ((scores, "scores"), (mask, "mask"), (norms, "norms")):
            nothing(ax, what)
        return figure
    numbers = [layer.layer for layer in metrics.layers]
    scores.plot(numbers, [layer.mean_score for layer in metrics.layers], "^--", color=MUTED, ms=4, label="all")
    _draw_with_gaps(scores, numbers, [layer.chosen_score for layer in metrics.layers], BLUE, "chosen")
    mask.bar(numbers, [layer.chosen for layer in metrics.layers], color=BLUE, alpha=0.85, linewidth=0)
    mask.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    if all(layer.delta_norm is None for layer in metrics.layers):
        nothing(norms, "norms", keep_x=True)
    else:
        _draw_with_gaps(norms, numbers, [layer.delta_norm for layer in metrics.layers], VERMILION, "norm")
    for ax in (scores, norms):
        ax.yaxis.set_major_locator(MaxNLocator(4))
        # As the table has them: an exponent above the axis would stand in the title.
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        if ax.lines:
            ax.legend(loc="upper left", ncols=3)
    norms.set_xlabel("layer (block whose FFN output projection it is)")
    norms.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_with_gaps(ax: Axes, layers: Sequence[int], values: Sequence[float | None], colour: str, label: str) -> None:
    """One value a layer, and a cross below the line of zero for a layer without one."""
    ax.plot(layers, [math.nan if v is None else v for v in values], "o-", color=colour, ms=4.5, label=label)
    low, high = min(0.0, ax.get_ylim()[0]), max(0.0, ax.get_ylim()[1])  # signed scores may all be negative
    span, gaps = high - low, [layer for layer, value in zip(layers, values, strict=True) if value is None]
    foot = 0.14 * span if gaps else 0.0
    ax.set_ylim(low - foot, high + 0.25 * span)  # a legend above, crosses below
    if gaps:
        ax.plot(gaps, [low - foot / 2] * len(gaps), "x", color=MUTED, ms=5, mew=1.2, label="n/a")


def _short(name: str) -> str:
    """Cut in the middle: variants of one method differ in how their names end."""
    return name if len(name) <= 18 else f"{name[:8]}…{name[-9:]}"
