"""The pictures of `paving diagnose`: the corrupted router, the trajectory, and where the buckets separate."""

from __future__ import annotations

import math
from collections.abc import Iterable

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from paving.evaluation.diagnostics.records import Diagnostics
from paving.prompts.types import Bucket
from paving.report.figures import nothing
from paving.report.svg import COLOURS, MUTED, inline, new_figure

EDIT, BENIGN, HARMFUL = (COLOURS[b] for b in Bucket)


def corrupted_router(found: Diagnostics) -> str:
    """What the keeps lose as correct gates are flipped."""
    return inline(_draw_corruption, found, "corrupted", "Keeps and edits as a share of the oracle's gates is flipped")


def trajectory(found: Diagnostics) -> str:
    """Alignment of the edit with the target and with a refusal, by layer and by step (the paper's figure 4)."""
    return inline(_draw_trajectory, found, "trajectory", "Cosine of the edit with target and refusal directions")


def separability(found: Diagnostics) -> str:
    """AUC of linear probes, layer by layer."""
    return inline(_draw_probes, found, "probes", "How well a linear probe tells the buckets apart, by layer")


def _draw_corruption(found: Diagnostics) -> Figure:
    figure = new_figure(height=6.4)
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.set_title("Preservation of the keeps")
    bottom.set_title("Refusal")
    rates = [100 * p.rate for p in found.corruption]
    scores = (
        ("benign keep", [p.benign_preservation for p in found.corruption], BENIGN, "^"),
        ("harmful keep", [p.harmful_preservation for p in found.corruption], HARMFUL, "v"),
    )
    refusals = (
        ("edit", [p.edit_refusal for p in found.corruption], EDIT, "o"),
        ("harmful keep", [p.harmful_refusal for p in found.corruption], HARMFUL, "s"),
        ("benign keep", [p.benign_refusal for p in found.corruption], BENIGN, "^"),
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


def _draw_trajectory(found: Diagnostics) -> Figure:
    figure = new_figure(height=6.4)
    top, bottom = figure.subplots(2, 1, sharey=True)
    record = found.trajectory
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


def _draw_probes(found: Diagnostics) -> Figure:
    figure = new_figure(height=3.6)
    ax = figure.subplots()
    layers = [p.layer for p in found.probes]
    series = (
        ("edit / benign keep", [p.edit_vs_benign for p in found.probes], BENIGN, "^"),
        ("edit / harmful keep", [p.edit_vs_harmful for p in found.probes], HARMFUL, "s"),
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
    ax.legend(loc="lower right")
    return figure


def _percents(values: Iterable[float | None]) -> list[float]:
    return [math.nan if v is None else 100 * v for v in values]


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [math.nan if v is None else v for v in values]
