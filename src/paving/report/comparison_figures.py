"""The picture of a comparison: edit success against the drift of harmful refusal, every method and variant in it."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paving.evaluation.comparison import BASE, OWN, ComparedRow, Comparison, Rule
from paving.prompts.types import Bucket
from paving.report.figures import nothing
from paving.report.svg import COLOURS, INK, MUTED, PURPLE, inline, new_figure

# Middle tones, so that a mark is seen on a white page and on a dark one.
METHOD_COLOURS = (
    *(COLOURS[b] for b in (Bucket.EDIT, Bucket.HARMFUL_KEEP, Bucket.BENIGN_KEEP)), "#cc79a7", "#e69f00", "#7f6fd1",
    "#5e8c31", "#b3475a", "#0fa3b1", "#8a6d5c", PURPLE, "#9aa01f",
)  # fmt: skip
MARKERS = {"global": "o", "probe": "s", "probe+veto": "^", "oracle": "D", "own": "v"}
OWN_MARKERS = {"learned": "s", "learned+veto": "^", "oracle": "D"}  # as the variant that each can be compared with
OWN_SIZES = {"learned": 13, "learned+veto": 8, "oracle": 11}  # the veto often changes nothing: its mark then stands inside
RING = 13  # round Residual Paving at the scale that the panel's rule took, where that is not the one of its training
HOLLOW = {"learned", "oracle"}


def trade_off(found: Comparison) -> str:
    """Edit success against harmful-refusal drift, with intervals."""
    return inline(draw_trade_off, found, "comparators", "Edit success against drift of harmful refusal, by method")


def draw_trade_off(found: Comparison) -> Figure:
    """A panel for each rule: where scales come from decides as much as methods do."""
    by_rule = {rule: [r for r in shown_rows(found, rule) if _known(r)] for rule in ("control", "strict")}
    shown = [r for marks in by_rule.values() for r in marks]
    methods = list(dict.fromkeys(r.method for r in found.rows if r.method not in (BASE, OWN)))
    colours = {m: METHOD_COLOURS[i % len(METHOD_COLOURS)] for i, m in enumerate(methods)}
    figure = new_figure(height=8.6 + 0.25 * ((len(methods) + 2) // 2 + 3))
    for ax, (rule, marks) in zip(figure.subplots(2, 1), by_rule.items(), strict=True):
        ax.set_title(f"Scales by the {rule} {'score' if rule == 'control' else 'limits'}")
        if not marks:
            nothing(ax, "rows")
            continue
        ax.axvspan(100 * found.limits.harmful_drift, 100, color=COLOURS[Bucket.BENIGN_KEEP], alpha=0.08, linewidth=0)
        ax.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        for r in marks:
            _draw_mark(ax, r, colours)
        _set_limits(ax, marks)
        ax.set(xlabel="harmful refusal less the base's, pp", ylabel="edit success, %")
    if shown:
        _draw_legends(figure, shown, {m: c for m, c in colours.items() if any(r.method == m for r in shown)})
    return figure


def shown_rows(found: Comparison, rule: Rule) -> list[ComparedRow]:
    """The run's own rows, and of every method and variant, its own among them, the one that the rule took."""
    taken = f"{rule}/{'three' if 'three' in found.objectives else 'two'}"
    chosen = [r for r in found.rows if r.method == BASE or (taken in r.chosen_by and not is_own(r))]
    return [*chosen, *(r for r in found.rows if is_own(r))]


def is_own(r: ComparedRow) -> bool:
    """A row of the run's own evaluation; the same controller at another scale is none."""
    return r.method == OWN and r.row.name == r.variant


def _known(r: ComparedRow) -> bool:
    return r.edit_success.rate is not None and r.row.harmful_drift is not None


def _draw_mark(ax: Axes, r: ComparedRow, colours: dict[str, str]) -> None:
    x, y = 100 * r.row.harmful_drift, 100 * r.edit_success.rate
    if r.method == BASE:
        ax.plot(x, y, "x", color=INK, ms=7, mew=1.8, clip_on=False, zorder=6)
        return
    own, by_rule = is_own(r), r.method == OWN and not is_own(r)
    colour = INK if r.method == OWN else colours[r.method]
    marker = OWN_MARKERS.get(r.variant) if r.method == OWN else None
    marker = marker or MARKERS.get(r.variant, "o")  # Residual Paving behind the comparators' probe, too
    # Bars fainter than marks: with ten methods it is the marks that must be found.
    width, alpha = (1.4, 0.8) if own else (1.0, 0.3)
    bars = {"fmt": "none", "ecolor": colour, "elinewidth": width, "alpha": alpha, "zorder": 4 + own}
    paired = r.row.against_base.get(Bucket.HARMFUL_KEEP)
    if paired is not None and paired.low is not None and paired.high is not None:
        ax.errorbar(x, y, xerr=[[max(0.0, x - 100 * paired.low)], [max(0.0, 100 * paired.high - x)]], **bars)
    low, high = r.edit_success.low, r.edit_success.high
    if low is not None and high is not None:
        ax.errorbar(x, y, yerr=[[max(0.0, y - 100 * low)], [max(0.0, 100 * high - y)]], **bars)
    face = "none" if r.variant in HOLLOW else colour
    # Within its ring small and on top: where a method stands at the same place, a rim of that is left.
    size = OWN_SIZES.get(r.variant, 11) if own else 4.2 if by_rule else 6.5
    if by_rule:  # a ring tells it from the row at the scale of its training
        ax.plot(x, y, "o", color=INK, mfc="none", mec=INK, ms=RING, mew=1, clip_on=False, zorder=5)
    ax.plot(
        x,
        y,
        marker,
        color=colour,
        mfc=face,
        mec=colour,
        ms=size,
        mew=2 if own else 1.5,
        clip_on=False,
        zorder=5 + own + 2 * by_rule,
    )


def _set_limits(ax: Axes, marks: list[ComparedRow]) -> None:
    drifts = [100 * r.row.harmful_drift for r in marks]
    lowest, highest = min(drifts), max(drifts)
    room = max(3.0, 0.08 * (highest - lowest))
    ax.set(xlim=(lowest - room, max(highest, 0.0) + room), ylim=(-3, 103))


def _draw_legends(figure: Figure, marks: list[ComparedRow], colours: dict[str, str]) -> None:
    dot = {"linestyle": "none", "marker": "o", "ms": 7}
    entries = [(Line2D([], [], color=colours[m], **dot), m) for m in colours]
    if any(r.method == BASE for r in marks):
        entries.append((Line2D([], [], color=INK, linestyle="none", marker="x", mew=1.8), "base"))
    own = {r.variant for r in marks if is_own(r)}
    entries += [_shape(OWN_MARKERS[v], v, f"Residual Paving, {v}", INK, OWN_SIZES[v] - 1) for v in OWN_MARKERS if v in own]
    if any(r.method == OWN and not is_own(r) for r in marks):
        entries.append(
            (Line2D([], [], color=INK, marker="o", mfc="none", ms=RING - 1, linestyle="none"), "ringed: by the rule")
        )
    variants = {r.variant for r in marks if r.method not in (BASE, OWN)}
    entries += [_shape(MARKERS[v], v, f"shape: {v}", MUTED, 7) for v in MARKERS if v in variants]
    handles, names = zip(*entries, strict=True)
    figure.legend(handles, names, loc="outside lower left", ncols=2, columnspacing=1.2, handletextpad=0.4)


def _shape(marker: str, variant: str, name: str, colour: str, size: float) -> tuple[Line2D, str]:
    face = "none" if variant in HOLLOW else colour
    return Line2D([], [], color=colour, marker=marker, mfc=face, ms=size, mew=1.8, linestyle="none"), name
