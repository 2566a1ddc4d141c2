"""Figures 2 to 4 of the paper, drawn from a run: what is read and edited, the gate policies, where the edit moves."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from paving.evaluation.diagnostics.records import TrajectoryRecord
from paving.prompts.types import Bucket
from paving.report.figures import nothing
from paving.report.svg import COLOURS, INK, LINE, MUTED, STYLE, TERM_COLOURS, new_figure
from paving.report.tables import BUCKET_NAMES
from paving.reproduce.diagnosed import lacking, trajectory_of
from paving.reproduce.protocol import edited_layers, layers_text
from paving.reproduce.published import number, paper_name, published
from paving.reproduce.runs import Run
from paving.reproduce.variants import short_name
from paving.run_folder import RunError

FIGURES = ("figure-2", "figure-3", "figure-4")
FORMATS = ("svg", "png")


def draw_figure(name: str, runs: Sequence[Run], file_format: str) -> bytes:
    """A figure as a file of its own on white, "svg" (letters as paths: nothing is fetched) or "png".

    raises ValueError for another figure or format, or more than one run where a figure shows one;
    RunError for a run that lacks what the figure shows, with the command that makes it
    """
    if file_format not in FORMATS:
        raise ValueError(f"a figure is written as {' or '.join(FORMATS)}, not as {file_format!r}.")
    if name not in FIGURES:
        raise ValueError(f"there is no {name!r} here; allowed: {', '.join(FIGURES)}.")
    if not runs or (len(runs) > 1 and name != "figure-4"):
        raise ValueError(f"{name} shows one run, {len(runs)} were given: paving reproduce {name} --runs RUN --out FILE.svg")
    with rc_context({**STYLE, "svg.fonttype": "path", "savefig.facecolor": "white"}):
        match name:
            case "figure-2":
                figure = draw_operation(runs[0])
            case "figure-3":
                figure = draw_policies(runs[0])
            case _:
                figure = draw_movement(runs)
        buffer = BytesIO()
        # Without metadata the same numbers give the same bytes, and no licence link stands in the file.
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type")) if file_format == "svg" else {}
        figure.savefig(buffer, format=file_format, dpi=200, metadata=metadata)
    return buffer.getvalue()


def figure_name(asked: str) -> str | None:
    """`figure 4`, `Fig.4` or `figure-4` -> "figure-4"; None where no figure of that number is drawn here."""
    words = asked.lower()
    if not words.startswith("fig"):
        return None
    name = "figure-" + words.removeprefix("figure").removeprefix("fig").strip(" -_.")
    return name if name in FIGURES else None


# --- figure 2: the operation ----------------------------------------------------------------------------------------


def draw_operation(run: Run) -> Figure:
    """Which blocks the router reads, which are edited by which expert, and what decides whether they are."""
    edited = edited_layers(run)
    if run.n_layers is None or edited is None:
        raise RunError(f"{run.name} is not trained yet. Make it: paving train --out {run.folder} ...")
    figure = new_figure(height=7.4)
    blocks, flow = figure.subplots(1, 2, width_ratios=(1.0, 1.15))
    _draw_blocks(blocks, run, edited, run.n_layers)
    _draw_flow(flow, run)
    return figure


def _draw_blocks(ax: Axes, run: Run, edited: tuple[int, ...], n_layers: int) -> None:
    """One line a block, the first at the bottom: read or not, edited or not, and how wide each expert's window is there."""
    controller = run.config.controller
    experts = range(controller.n_experts)
    for layer in range(n_layers):
        read, edit = layer in controller.route_layers, layer in edited
        ax.add_patch(Rectangle((0, layer - 0.4), 0.8, 0.8, color=INK if read else LINE, linewidth=0))
        ax.add_patch(Rectangle((1, layer - 0.4), 0.8, 0.8, color=COLOURS[Bucket.EDIT] if edit else LINE, linewidth=0))
        for k in experts:
            width = 0.9 * controller.window(k, layer, n_layers) if edit else 0.0
            colour = TERM_COLOURS[k % len(TERM_COLOURS)]
            ax.add_patch(Rectangle((2.2 + 1.05 * k, layer - 0.4), width, 0.8, color=colour, alpha=0.55, linewidth=0))
    heads = [0.4, 1.4, *(2.65 + 1.05 * k for k in experts)]
    ax.set_xticks(heads, ["read", "edited", *(f"expert {k}" for k in experts)], rotation=90)
    ax.set(xlim=(-0.2, 2.2 + 1.05 * controller.n_experts), ylim=(-0.8, n_layers - 0.2), ylabel="block")
    ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.set_title("Blocks")


def _draw_flow(ax: Axes, run: Run) -> None:
    """What happens to a prompt, from the bottom to the top as the blocks beside it."""
    config, row = run.config, run.deployed
    pooling = {"last": "last token", "mean": "mean of tokens", "last+mean": "last token, mean"}[config.controller.pooling]
    router = run.metrics.router if run.metrics else None
    policy = f"{row.policy}, τ = {router.threshold:.3g}" if row and router else "not evaluated yet"
    veto = "none" if router is None or router.veto_threshold is None else f"v(x) ≤ {router.veto_threshold:.3g}"
    size = f"s = {row.scale:g}" if row and row.scale is not None else "s: not calibrated yet"
    steps = (
        ("prompt x", "frozen base", MUTED),
        ("boundary feature z(x)", f"blocks {layers_text(config.controller.route_layers)}; {pooling}", INK),
        ("router", f"gate logit a(x); mixture w(x), K = {config.controller.n_experts}", INK),
        ("gate γ(x)", policy, COLOURS[Bucket.EDIT]),
        ("veto m(x)", veto, COLOURS[Bucket.HARMFUL_KEEP]),
        ("edit, generated tokens", f"h ← h + s·m·γ·Σ w·e(h); {size}", COLOURS[Bucket.EDIT]),
        ("next token", "", MUTED),
    )
    gap = 1.5
    for i, (head, detail, colour) in enumerate(steps):
        y = gap * i
        ax.add_patch(Rectangle((0, y), 10, 0.95, fill=False, edgecolor=colour, linewidth=1.4))
        ax.text(5, y + (0.66 if detail else 0.475), head, ha="center", va="center", weight="bold", fontsize=10.5)
        ax.text(5, y + 0.27, detail, ha="center", va="center", fontsize=8.5, color=INK)
        if i:
            ax.annotate("", (5, y - 0.03), (5, y - gap + 0.98), arrowprops={"arrowstyle": "->", "color": MUTED})
    # Beside the gate, because it is the only thing that oracle routing changes.
    ax.text(5.3, 4 * gap - 0.28, "oracle: γ = true label", ha="left", va="center", fontsize=8.5, color=MUTED)
    ax.set(xlim=(-0.2, 10.2), ylim=(-0.3, gap * (len(steps) - 1) + 1.2))
    ax.set_axis_off()
    ax.set_title(_title(short_name(config.model), 26))


# --- figure 3: gate policies ----------------------------------------------------------------------------------------


def draw_policies(run: Run) -> Figure:
    """The four policies over the gate logit with this run's threshold, and where its held-out prompts lie."""
    if run.metrics is None:
        raise RunError(f"{run.name} is not evaluated yet. Make it: paving eval {run.folder}")
    router = run.metrics.router
    every = [a for values in router.logits.values() for a in values]
    low, high = (min([*every, -4.0]) - 0.5, max([*every, 4.0]) + 0.5)
    figure = new_figure(height=7.2)
    panels = figure.subplots(4, 1, sharex=True, height_ratios=(3.2, 1, 1, 1))
    _draw_gates(panels[0], router.threshold, low, high)
    for ax, bucket in zip(panels[1:], Bucket, strict=True):
        _draw_logits(ax, router.logits.get(bucket, []), bucket, router.threshold, (low, high))
    panels[-1].set(xlim=(low, high), xlabel=f"gate logit a(x)  (dashed: τ = {router.threshold:.3g})")
    return figure


def _draw_gates(ax: Axes, threshold: float, low: float, high: float) -> None:
    a = np.linspace(low, high, 2001)
    soft = 1 / (1 + np.exp(-a))
    looks = (
        ("soft", soft, MUTED, "-", 1.8),
        ("hard", (a > threshold).astype(float), TERM_COLOURS[4], "--", 2.2),
        ("thresholded-soft", soft * (a > threshold), COLOURS[Bucket.EDIT], "-", 2.6),
    )
    for name, gate, colour, line, width in looks:
        ax.plot(a, gate, line, color=colour, linewidth=width, label=name)
    # The oracle does not look at the logit: the label alone decides.
    ax.plot([low, high], [1, 1], color=INK, linewidth=1, linestyle=(0, (1, 2)), label="oracle (edit 1, keep 0)")
    ax.plot([low, high], [0, 0], color=INK, linewidth=1, linestyle=(0, (1, 2)))
    ax.set(ylim=(-0.06, 1.12), ylabel="gate γ(x)")
    ax.set_title("Gate policies")
    # Below the curves' own axes nothing is free: beside the step they cross every corner.
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.1), ncols=2, columnspacing=1.4)


def _draw_logits(ax: Axes, values: Sequence[float], bucket: Bucket, threshold: float, span: tuple[float, float]) -> None:
    n_open = sum(v > threshold for v in values)
    ax.set_title(f"{BUCKET_NAMES[bucket].capitalize()}: {n_open} of {len(values)} above τ")
    if not values:
        nothing(ax, "gate logits", keep_x=True)
        return
    counts, edges = np.histogram(values, np.linspace(*span, 49))
    share = 100 * counts / len(values)
    ax.bar(edges[:-1], share, width=edges[1] - edges[0], align="edge", color=COLOURS[bucket], alpha=0.85)
    ax.axvline(threshold, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    ax.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    ax.set_ylabel("%")


# --- figure 4: where the edit moves ---------------------------------------------------------------------------------


def draw_movement(runs: Sequence[Run]) -> Figure:
    """Mean cosine of the edit's displacement with the edit target's and a refusal's, by edited layer; a panel a run."""
    found = [(run, _trajectory(run)) for run in runs]
    figure = new_figure(height=0.6 + 2.9 * len(runs))
    panels = figure.subplots(len(runs), 1, squeeze=False, sharey=True).flatten()
    for ax, (run, record) in zip(panels, found, strict=True):
        _draw_alignment(ax, run, record)
    # Over the first panel: lines cross anywhere inside.
    panels[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.12), ncols=2, columnspacing=1.4)
    return figure


def _draw_alignment(ax: Axes, run: Run, record: TrajectoryRecord) -> None:
    name = paper_name(run.config.model)
    ax.set_title(_title(f"{run.name}: {name or short_name(run.config.model)} (n={record.edit.n})", 48))
    if not record.edit.n:
        nothing(ax, "edited prompts")
        return
    layers = [p.layer for p in record.layers]
    series = (
        ("towards the edit target", [p.edit for p in record.layers], COLOURS[Bucket.EDIT], "o-"),
        ("towards a refusal", [p.refusal for p in record.layers], COLOURS[Bucket.HARMFUL_KEEP], "s--"),
    )
    for label, values, colour, look in series:
        ax.plot(layers, [math.nan if v is None else v for v in values], look, color=colour, ms=4.5, label=label)
    if (printed := _printed_alignment(name)) is not None:
        for value, colour in zip(printed, (COLOURS[Bucket.EDIT], COLOURS[Bucket.HARMFUL_KEEP]), strict=True):
            ax.axhline(value, color=colour, linewidth=1, linestyle=(0, (5, 3)))
        ax.text(0.99, 0.02, "thin: the paper's means over all layers", ha="right", fontsize=10, transform=ax.transAxes)
    ax.axhline(0, color=MUTED, linewidth=1, linestyle=(0, (1, 3)))
    ax.set(xlabel="block", ylabel="mean cosine")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _title(text: str, width: int) -> str:
    """Folded, so that a long name does not run over the edge."""
    return textwrap.fill(text, width, max_lines=2)


def _trajectory(run: Run) -> TrajectoryRecord:
    if (found := trajectory_of(run)) is None:
        raise RunError(lacking(run, "trajectories"))
    return found


def _printed_alignment(name: str | None) -> tuple[float, float] | None:
    """Table 4's mean cosines, where the backbone is one of its two."""
    head = published("4").blocks[0]
    if name is None or all(row[0] != name for row in head.rows):
        return None
    edit, refusal = (number(head.cell(heading, name, "Edit")) for heading in ("Edit align.", "Refusal align."))
    return None if edit is None or refusal is None else (edit, refusal)
