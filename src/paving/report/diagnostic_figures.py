"""The pictures of `paving diagnose`, one function a part: from its record to an SVG that stands inline in a page."""

from __future__ import annotations

import math
from collections.abc import Iterable

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from paving.evaluation.diagnostics.records import (
    CellBlock,
    CorruptionCurve,
    NormsRecord,
    ProbeCurve,
    RouteCalibration,
    TrajectoryRecord,
)
from paving.prompts.types import Bucket
from paving.report.figures import nothing
from paving.report.svg import COLOURS, INK, MUTED, TERM_COLOURS, inline, new_figure
from paving.report.tables import BUCKET_NAMES

EDIT, BENIGN, HARMFUL = (COLOURS[b] for b in Bucket)
MARKERS = {Bucket.EDIT: "o", Bucket.BENIGN_KEEP: "^", Bucket.HARMFUL_KEEP: "s"}


def corrupted_router(found: CorruptionCurve) -> str:
    """What the keeps lose as correct gates are flipped."""
    return inline(_draw_corruption, found, "corrupted", "Keeps and edits as a share of the oracle's gates is flipped")


def trajectory(found: TrajectoryRecord) -> str:
    """Alignment of the edit with the target and with a refusal, by layer and by step (the paper's figure 4)."""
    return inline(_draw_trajectory, found, "trajectory", "Cosine of the edit with target and refusal directions")


def separability(found: ProbeCurve) -> str:
    """AUC of linear probes, layer by layer."""
    return inline(_draw_probes, found, "probes", "How well a linear probe tells the buckets apart, by layer")


def norms(found: NormsRecord) -> str:
    """Size of the residual stream, and of the edit relative to it."""
    return inline(_draw_norms, found, "norms", "Residual norms and the edit's share of them, by layer")


def veto(found: RouteCalibration) -> str:
    """What each veto threshold closes, bucket by bucket."""
    return inline(_draw_veto, found, "veto", "Share of each bucket that the veto closes, by threshold")


def grid(found: CellBlock) -> str:
    """Every cell: edits answered against harmful refusals kept."""
    return inline(_draw_grid, found, "grid", "Safe answers on edit prompts against harmful refusal, by cell")


def _draw_corruption(found: CorruptionCurve) -> Figure:
    figure = new_figure(height=6.4)
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.set_title("Preservation of the keeps")
    bottom.set_title("Refusal")
    rates = [100 * p.rate for p in found.points]
    scores = (
        ("benign keep", [p.benign_preservation for p in found.points], BENIGN, "^"),
        ("harmful keep", [p.harmful_preservation for p in found.points], HARMFUL, "v"),
    )
    refusals = (
        ("edit", [p.edit_refusal for p in found.points], EDIT, "o"),
        ("harmful keep", [p.harmful_refusal for p in found.points], HARMFUL, "s"),
        ("benign keep", [p.benign_refusal for p in found.points], BENIGN, "^"),
    )
    for ax, series, label in ((top, scores, "exp(−KL), %"), (bottom, refusals, "refused, %")):
        for name, bands, colour, marker in series:
            ax.plot(rates, _percents(b.mean for b in bands), color=colour, marker=marker, ms=4.5, label=name)
            low, high = _percents(b.low for b in bands), _percents(b.high for b in bands)
            ax.fill_between(rates, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.set(ylim=(-3, 103), ylabel=label)
    top.legend(loc="lower left")
    # Below: lines cross from corner to corner here, and leave no room inside.
    bottom.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, columnspacing=1.2)
    bottom.set(xlim=(-2, 102), xlabel="gates flipped away from the true label, %")
    return figure


def _draw_trajectory(record: TrajectoryRecord) -> Figure:
    figure = new_figure(height=6.4)
    top, bottom = figure.subplots(2, 1, sharey=True)
    top.set_title(f"By layer (n={record.edit.n} edit prompts)")
    bottom.set_title("By step of the edit target")
    panels = (
        (top, [a.layer for a in record.layers], record.layers, "layer"),
        (bottom, [a.step for a in record.steps], record.steps, "step (0 predicts the first token; not defined there)"),
    )
    for ax, x, points, label in panels:
        if not record.edit.n:
            nothing(ax, "edited prompts")
            continue
        ax.plot(x, _numbers(p.edit for p in points), "o-", color=EDIT, ms=4.5, label="towards the edit target")
        ax.plot(x, _numbers(p.refusal for p in points), "s--", color=HARMFUL, ms=4.5, label="towards a refusal")
        ax.axhline(0, color=MUTED, linewidth=1, linestyle=(0, (1, 3)))
        ax.set(xlabel=label, ylabel="mean cosine")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if record.edit.n:
        bottom.legend(loc="best")
    return figure


def _draw_probes(found: ProbeCurve) -> Figure:
    figure = new_figure(height=4.0)
    ax = figure.subplots()
    layers = [p.layer for p in found.layers]
    series = (
        ("edit / benign keep", [p.edit_vs_benign for p in found.layers], BENIGN, "^"),
        ("edit / harmful keep", [p.edit_vs_harmful for p in found.layers], HARMFUL, "s"),
    )
    for name, values, colour, marker in series:
        ax.plot(layers, _numbers(values), color=colour, marker=marker, ms=4.5, label=name)
    ax.axhline(0.5, color=MUTED, linewidth=1, linestyle=(0, (1, 3)))
    known = [v for _, values, _, _ in series for v in values if v is not None]
    if not known:
        nothing(ax, "probes")
        return figure
    ax.set(ylim=(min(0.45, min(known) - 0.02), 1.02), xlabel="layer read, last prompt token", ylabel="cross-validated AUC")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    # Below: probes of any quality, and the line of a guess, may run anywhere inside.
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, columnspacing=1.2)
    return figure


def _draw_norms(found: NormsRecord) -> Figure:
    figure = new_figure(height=6.4)
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.set_title("Residual stream, every gate open")
    bottom.set_title("The edit's share of it")
    drawn = False
    for bucket in Bucket:
        rows = [r for r in found.layers if r.bucket == bucket and r.base is not None]
        if not rows:
            continue
        drawn = True
        layers = [r.layer for r in rows]
        look = {"color": COLOURS[bucket], "marker": MARKERS[bucket], "ms": 4}
        top.plot(layers, [r.base for r in rows], "-", label=BUCKET_NAMES[bucket], **look)
        top.plot(layers, [r.edited for r in rows], ":", **look | {"marker": ""})
        bottom.plot(layers, _percents(r.share_open for r in rows), "-", **look)
        bottom.plot(layers, _percents(r.share_deployed for r in rows), "--", **look | {"ms": 3})
    if not drawn:
        nothing(top, "norms")
        nothing(bottom, "norms")
        return figure
    top.set(yscale="log", ylabel="RMS")
    # Plain numbers: the page draws no formulas, and powers of ten would be spelled out as one.
    top.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    top.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    top.yaxis.set_minor_formatter(NullFormatter())
    lines = [Line2D([], [], color=MUTED, linestyle=style) for style in ("-", ":")]
    top.add_artist(top.legend(loc="upper left"))
    top.legend(lines, ["base", "edited"], loc="lower right")
    lines = [Line2D([], [], color=MUTED, linestyle=style) for style in ("-", "--")]
    bottom.legend(lines, ["every gate open", f"deployed gate ({found.policy})"], loc="upper left")
    bottom.set(xlabel="layer", ylabel="RMS of the edit / base, %")
    bottom.set_ylim(bottom=0)
    bottom.margins(y=0.25)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_veto(found: RouteCalibration) -> Figure:
    figure = new_figure(height=3.9)
    ax = figure.subplots()
    if not found.curve:
        nothing(ax, "veto thresholds")
        return figure
    thresholds = [p.threshold for p in found.curve]
    for bucket in Bucket:
        shares = _percents(p.vetoed[bucket].rate for p in found.curve)
        ax.plot(thresholds, shares, color=COLOURS[bucket], label=BUCKET_NAMES[bucket])
    styles = ((0, (4, 3)), (0, (1, 2)))
    for point, style in zip(found.vetoes, styles, strict=False):
        ax.axvline(point.threshold, color=INK, linewidth=1.2, linestyle=style, label=point.name)
    ax.set(ylim=(-3, 103), xlabel="veto threshold (logit)", ylabel="closed by the veto, %")
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, columnspacing=1.2)
    return figure


def _draw_grid(found: CellBlock) -> Figure:
    figure = new_figure(height=5.2)
    ax = figure.subplots()
    harmful = [c.row.refusal[Bucket.HARMFUL_KEEP].rate for c in found.cells]
    if not found.cells or all(r is None for r in harmful) or found.cells[0].safe_answers.rate is None:
        nothing(ax, "cells")
        return figure
    policies = list(dict.fromkeys(c.policy for c in found.cells))
    mixtures = list(dict.fromkeys(c.mixture for c in found.cells))
    scales = sorted({c.scale for c in found.cells})
    sizes = {s: 5 + 4 * i for i, s in enumerate(scales)}
    for policy in policies:
        for mixture in mixtures:
            line = sorted((c for c in found.cells if (c.policy, c.mixture) == (policy, mixture)), key=lambda c: c.scale)
            x = _percents(c.safe_answers.rate for c in line)
            y = _percents(c.row.refusal[Bucket.HARMFUL_KEEP].rate for c in line)
            colour = TERM_COLOURS[policies.index(policy) % 6]
            marker = "osD^vx"[mixtures.index(mixture) % 6]
            ax.plot(x, y, "-", color=colour, linewidth=1, alpha=0.6)
            for xi, yi, cell in zip(x, y, line, strict=True):
                ax.plot(xi, yi, marker, color=colour, ms=sizes[cell.scale], mfc="none", mew=1.6, clip_on=False)
    handles = [Line2D([], [], color=TERM_COLOURS[i % 6], linewidth=3) for i in range(len(policies))]
    handles += [
        Line2D([], [], color=MUTED, marker="osD^vx"[i % 6], mfc="none", linestyle="none") for i in range(len(mixtures))
    ]
    handles += [Line2D([], [], color=MUTED, marker="o", mfc="none", ms=sizes[s], linestyle="none") for s in scales]
    names = [*policies, *mixtures, *(f"scale {s:g}" for s in scales)]
    ax.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, columnspacing=1.2)
    ax.set(xlim=(-3, 103), ylim=(-3, 103))
    ax.set(xlabel="edit prompts with a safe answer, %", ylabel="harmful keeps refused, %")
    return figure


def _percents(values: Iterable[float | None]) -> list[float]:
    return [math.nan if v is None else 100 * v for v in values]


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [math.nan if v is None else v for v in values]
