"""The pictures of a run, one function each: from the metrics to an SVG string that stands inline in a page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from io import BytesIO

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from paving.evaluation.results import Metrics, Rate
from paving.prompts.types import Bucket
from paving.report.svg import COLOURS, INK, MUTED, STYLE, TERM_COLOURS, inline, new_figure
from paving.report.tables import BUCKET_NAMES, missing, percent


def three_way(metrics: Metrics) -> str:
    """Refusal of every row in every bucket, with its Wilson interval: the main picture."""
    return inline(draw_three_way, metrics, "three-way", "Refusal by row and bucket, with 95% Wilson intervals")


def trade_off(metrics: Metrics) -> str:
    """What a stricter gate costs, and what a larger scale costs."""
    return inline(_draw_trade_off, metrics, "trade-off", "Operating points over gate thresholds and over scales")


def gate_histograms(metrics: Metrics) -> str:
    """Where the gate probabilities of each bucket lie, and the threshold among them."""
    return inline(_draw_gate_histograms, metrics, "gates", "Gate probabilities by bucket")


def reliability(metrics: Metrics) -> str:
    """Whether a gate probability means what it says."""
    return inline(_draw_reliability, metrics, "reliability", "Reliability of the gate probability")


def training_curves(metrics: Metrics) -> str:
    """The losses of every stage by epoch."""
    return inline(_draw_training_curves, metrics, "training", "Training losses by stage and epoch")


def picture(metrics: Metrics, file_format: str) -> bytes:
    """The main picture as a file of its own, on white: "png" or "svg"."""
    # Alone it has no page to borrow a font from, so letters are drawn as paths.
    with rc_context({**STYLE, "svg.fonttype": "path", "savefig.facecolor": "white"}):
        buffer = BytesIO()
        figure = draw_three_way(metrics)
        metadata = {"Date": None} if file_format == "svg" else {}  # the same numbers, the same bytes
        figure.savefig(buffer, format=file_format, dpi=220, metadata=metadata)
    return buffer.getvalue()


def draw_three_way(metrics: Metrics) -> Figure:
    rows, aims = metrics.rows, ("should fall", "should stay", "should stay")
    names = [textwrap.fill(row.name, 16, max_lines=2) for row in rows]
    line = 0.4 if any("\n" in name for name in names) else 0.28
    figure = new_figure(height=3 * (0.55 + line * max(1, len(rows))) + 0.35)
    panels = figure.subplots(3, 1, sharex=True)
    for ax, bucket, aim in zip(panels, Bucket, aims, strict=True):
        ax.set_title(f"{BUCKET_NAMES[bucket].capitalize()}: refusal {aim}")
        markers = ["D" if row.kind == "diagnostic" else "o" for row in rows]
        draw_rates(ax, names, [row.refusal.get(bucket) for row in rows], COLOURS[bucket], markers)
        base = next((row.refusal.get(bucket) for row in rows if row.kind == "reference"), None)
        if base is not None and base.rate is not None:
            ax.axvline(100 * base.rate, color=MUTED, linestyle=(0, (3, 3)), linewidth=1)
    panels[-1].set_xlabel("refused, % (dashed: base)")
    return figure


def draw_rates(
    ax: Axes, names: Sequence[str], rates: Sequence[Rate | None], colour: str, markers: Sequence[str] | None = None
) -> None:
    """A line for each name, from the top: bar, mark and whisker of its rate in per cent, and k/n beside it."""
    ax.set(xlim=(0, 100), ylim=(max(1, len(names)) - 0.4, -0.6), yticks=range(len(names)), yticklabels=names)
    ax.grid(axis="y", visible=False)
    ax.tick_params(length=0)
    ax.tick_params(axis="y", pad=8)  # a marker at 0 reaches over the axis
    for y, (rate, marker) in enumerate(zip(rates, markers or "o" * len(names), strict=True)):
        if rate is None or rate.rate is None:
            beside(ax, y, missing(rate.n if rate else 0), MUTED)
            continue
        ax.barh(y, 100 * rate.rate, height=0.56, color=colour, alpha=0.28, linewidth=0)
        look = {"fmt": marker, "ms": 5, "capsize": 3, "color": colour, "clip_on": False}
        ax.errorbar(100 * rate.rate, y, xerr=whisker(rate), **look)
        beside(ax, y, f"{percent(rate.rate)}%  {rate.k}/{rate.n}")


def _draw_trade_off(metrics: Metrics) -> Figure:
    figure = new_figure(height=7.8)
    gate, scale = figure.subplots(2, 1, height_ratios=(1, 1))
    _draw_thresholds(gate, metrics)
    _draw_scales(scale, metrics)
    return figure


def _draw_thresholds(ax: Axes, metrics: Metrics) -> None:
    ax.set_title("Gate threshold: what opening it costs")
    sweep = sorted(metrics.thresholds, key=lambda point: point.threshold)
    if all(point.active.get(Bucket.EDIT) is None for point in sweep):
        nothing(ax, "thresholds")
        return
    edit = percents(point.active.get(Bucket.EDIT) for point in sweep)
    for bucket, marker in ((Bucket.HARMFUL_KEEP, "s"), (Bucket.BENIGN_KEEP, "o")):
        keep = percents(point.active.get(bucket) for point in sweep)
        ax.plot(edit, keep, color=COLOURS[bucket], marker=marker, ms=3.5, label=BUCKET_NAMES[bucket])
    ax.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle=(0, (1, 3)), label="a gate that guesses")
    chosen = active_share(metrics)
    ring = {"marker": "o", "mfc": "none", "mec": INK, "mew": 1.5}
    if chosen is not None:
        for bucket in (Bucket.HARMFUL_KEEP, Bucket.BENIGN_KEEP):
            if (share := chosen.get(bucket)) is not None:
                ax.plot(100 * chosen[Bucket.EDIT], 100 * share, ms=11, zorder=5, clip_on=False, **ring)
        ax.plot([], [], ms=9, linestyle="none", label=f"chosen: logit > {metrics.router.threshold:.3g}", **ring)
    ax.set(xlim=(-2, 102), ylim=(-3, 103))
    ax.set(xlabel="edit prompts with the gate open, %", ylabel="keeps with the gate open, %")
    ax.legend(loc="upper left")


def active_share(metrics: Metrics) -> dict[str, float] | None:
    """Share of each bucket whose gate logit exceeds the chosen threshold; None where the run did not record it."""
    router = metrics.router
    if router.logits.get(Bucket.EDIT):
        return {
            bucket: sum(logit > router.threshold for logit in logits) / len(logits)
            for bucket, logits in router.logits.items()
            if logits
        }
    for point in metrics.thresholds:
        if math.isclose(point.threshold, router.threshold) and point.active.get(Bucket.EDIT) is not None:
            return {bucket: share for bucket, share in point.active.items() if share is not None}
    return None


def _draw_scales(ax: Axes, metrics: Metrics) -> None:
    ax.set_title("Scale: what strength costs (calibration)")
    sweep = sorted(metrics.scales, key=lambda point: point.scale)
    if not sweep:
        nothing(ax, "scales")
        return
    steps = range(len(sweep))  # evenly spaced: a sweep of 1, 2, 4, .. 16 would crowd its small scales together
    edit, benign, harmful = (COLOURS[bucket] for bucket in Bucket)
    rates = (
        ("edit refusal", [p.edit_refusal for p in sweep], edit, "o", "-"),
        ("harmful refusal", [p.harmful_refusal for p in sweep], harmful, "s", "-"),
        ("edit broken", [p.edit_broken for p in sweep], MUTED, "x", ":"),
    )
    scores = (
        ("benign pres.", [p.benign_preservation for p in sweep], benign, "^", "--"),
        ("harmful pres.", [p.harmful_preservation for p in sweep], harmful, "v", "--"),
    )
    for label, values, colour, marker, line in rates:
        ax.plot(steps, percents(v.rate for v in values), line, color=colour, marker=marker, ms=4.5, label=label)
        low, high = percents(v.low for v in values), percents(v.high for v in values)
        ax.fill_between(steps, low, high, color=colour, alpha=0.13, linewidth=0)
    for label, values, colour, marker, line in scores:
        ax.plot(steps, percents(v.value for v in values), line, color=colour, marker=marker, ms=4.5, label=label)
    for step, point in ((i, p) for i, p in enumerate(sweep) if p.chosen):
        label = f"chosen: {point.scale:g}"
        ax.axvline(step, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0, label=label)
    ax.set_xticks(steps, [f"{p.scale:g}" for p in sweep])
    ax.set(ylim=(-3, 103), xlabel="scale", ylabel="%")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, columnspacing=1.2, handlelength=2)


def _draw_gate_histograms(metrics: Metrics) -> Figure:
    figure = new_figure(height=5)
    panels = figure.subplots(3, 1, sharex=True, sharey=True)
    edges = np.linspace(0, 1, 26)
    threshold = _sigmoid(metrics.router.threshold)
    for ax, bucket in zip(panels, Bucket, strict=True):
        values = metrics.router.probabilities.get(bucket, [])
        ax.set_title(f"{BUCKET_NAMES[bucket].capitalize()} (n={len(values)})")
        ax.grid(axis="x", visible=False)
        if not values:
            nothing(ax, "gate probabilities", keep_x=True)
            continue
        counts, _ = np.histogram(np.clip(values, 0, 1), edges)
        share = 100 * counts / len(values)
        ax.bar(edges[:-1], share, width=0.04, align="edge", color=COLOURS[bucket], edgecolor="none", alpha=0.85)
        ax.axvline(threshold, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        ax.yaxis.set_major_locator(MaxNLocator(3))
    panels[1].set_ylabel("share of the bucket, %")
    panels[-1].set(xlim=(0, 1), xlabel=f"gate probability (dashed: threshold, {threshold:.3f})")
    return figure


def _draw_reliability(metrics: Metrics) -> Figure:
    router = metrics.router
    figure = new_figure(height=5.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    scores = (("ECE", router.ece), ("Brier", router.brier))
    top.set_title(", ".join(f"{name} {missing() if value is None else format(value, '.3f')}" for name, value in scores))
    bottom.set(xlim=(-0.02, 1.02), xlabel="gate probability")
    filled = [b for b in router.reliability if b.n and b.mean_probability is not None and b.edit_share is not None]
    if not filled:
        nothing(top, "bins")
        nothing(bottom, "bins")
        return figure
    top.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (1, 3)))
    colour = COLOURS[Bucket.EDIT]
    probabilities, shares = [b.mean_probability for b in filled], [b.edit_share for b in filled]
    top.plot(probabilities, shares, "o-", color=colour, ms=6, clip_on=False)
    top.set(ylim=(-0.02, 1.05), ylabel="share that is edit")
    centres = [(b.low + b.high) / 2 for b in router.reliability]
    counts = [b.n for b in router.reliability]
    widths = [0.9 * (b.high - b.low) for b in router.reliability]
    bottom.bar(centres, counts, width=widths, color=colour, alpha=0.3, linewidth=0)
    for x, n in zip(centres, counts, strict=True):
        bottom.text(x, n, str(n), ha="center", va="bottom", fontsize=11 if len(counts) <= 12 else 8)
    bottom.set(ylabel="prompts", ylim=(0, 1.3 * max(counts)))
    bottom.grid(axis="x", visible=False)
    bottom.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    return figure


def _draw_training_curves(metrics: Metrics) -> Figure:
    """One panel per loss term; epochs of all stages follow each other, one colour per stage."""
    stages = list(dict.fromkeys(point.stage for point in metrics.training))
    terms = list(dict.fromkeys(term for point in metrics.training for term in point.losses))
    n_rows = max(1, math.ceil(len(terms) / 2))
    figure = new_figure(height=0.9 + 1.55 * n_rows)
    panels = figure.subplots(n_rows, 2, squeeze=False, sharex=True).flatten()
    if not terms:
        nothing(panels[0], "epochs")
        panels[1].set_visible(False)
        return figure
    place = {(p.stage, p.epoch): i for i, p in enumerate(metrics.training, 1)}
    looks = {stage: {"color": TERM_COLOURS[i % 6], "marker": "osD^vx"[i % 6], "ms": 4} for i, stage in enumerate(stages)}
    for ax, term in zip(panels, terms, strict=False):
        ax.set_title(term.replace("preservation", "pres."))  # written out, it does not fit half the width
        finite = []
        for stage in stages:
            points = [p for p in metrics.training if p.stage == stage and term in p.losses]
            losses = [_finite(p.losses[term]) for p in points]
            ax.plot([place[p.stage, p.epoch] for p in points], losses, **looks[stage])
            finite += [loss for loss in losses if not math.isnan(loss)]
        if finite and min(finite) >= 0:
            ax.set_ylim(0, 1.1 * max(finite) or 1.0)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(4))
    for ax in panels[len(terms) :]:
        ax.set_visible(False)
    handles = [Line2D([], [], **looks[stage]) for stage in stages]
    seconds = {stage: sum(p.seconds for p in metrics.training if p.stage == stage) for stage in stages}
    names = [f"{stage.replace('_', ' ')} ({seconds[stage]:.0f} s)" for stage in stages]
    figure.legend(handles, names, loc="outside upper left", ncols=2)
    figure.supxlabel("epoch, stages in the order they ran", fontsize=12)
    figure.supylabel("mean weighted loss, nats", fontsize=12)
    return figure


def nothing(ax: Axes, what: str, *, keep_x: bool = False) -> None:
    """An empty panel says so; an empty pair of axes would look like zeros."""
    ax.grid(visible=False)
    # Hidden, not removed: panels that share an axis share its ticks, and the others may have data.
    ax.tick_params(axis="y", left=False, labelleft=False)
    if not keep_x:
        ax.tick_params(axis="x", bottom=False, labelbottom=False)
    ax.text(0.5, 0.5, f"n/a (n=0): no {what} recorded", ha="center", va="center", color=MUTED, transform=ax.transAxes)


def beside(ax: Axes, y: float, text: str, color: str = INK) -> None:
    ax.text(1.03, y, text, color=color, transform=ax.get_yaxis_transform(), va="center")


def whisker(rate: Rate) -> Sequence[Sequence[float]] | None:
    if rate.rate is None or rate.low is None or rate.high is None:
        return None
    # Clipped at 0: the bound of a rate of 0 or 1 may lie a rounding error inside it.
    return [[max(0.0, 100 * (rate.rate - rate.low))], [max(0.0, 100 * (rate.high - rate.rate))]]


def percents(fractions: Iterable[float | None]) -> list[float]:
    return [math.nan if f is None else 100 * f for f in fractions]


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
