"""How every figure looks, and how it becomes an SVG that stands inline in a page: no state, no files, nothing fetched.

Colours are written as CSS variables with a fallback, so one picture suits a light and a dark page.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape
from io import BytesIO

from matplotlib import rc_context
from matplotlib.figure import Figure

from paving.evaluation.results import Metrics
from paving.prompts.types import Bucket

# 5.4 inches are 389 units of the view box: about 1:1 on a phone, 1.3:1 in a desktop column, so text is legible on both.
WIDTH = 5.4
INK, MUTED, LINE = "#1f2328", "#5c6570", "#d3d8de"
# Okabe and Ito's blue, green and vermilion: told apart by readers with any common colour vision.
COLOURS = {Bucket.EDIT: "#0072b2", Bucket.BENIGN_KEEP: "#009e73", Bucket.HARMFUL_KEEP: "#d55e00"}
# Of pages with more curves than buckets; darker than the last ones below, to be read as a thin line on white.
PURPLE, OCHRE = "#a34f8f", "#a96d00"
TERM_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
CSS_NAMES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    COLOURS[Bucket.EDIT]: "edit",
    COLOURS[Bucket.BENIGN_KEEP]: "benign",
    COLOURS[Bucket.HARMFUL_KEEP]: "harmful",
    PURPLE: "purple",
    OCHRE: "ochre",
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "paving",
    "text.parse_math": False,  # a "$" in the name of a row is a "$", not the start of a formula
    "font.family": "sans-serif",
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 12,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "legend.fontsize": 11.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def new_figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.1)  # inches; a title needs air above it
    return figure


def inline(draw: Callable[[Metrics], Figure], metrics: Metrics, name: str, description: str) -> str:
    """Draw, and make the SVG fit to stand among others in one HTML page."""
    with rc_context(STYLE):
        buffer = BytesIO()
        # All None: matplotlib then writes no metadata block, whose licence links a page must not carry.
        draw(metrics).savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue().decode()
    svg = svg[svg.index("<svg") :]  # an XML prolog and a doctype have no place inside HTML
    # Only tags are touched, never text: the name of a row could look like an id.
    svg = re.sub(r"<[^<>]+>", lambda tag: _adapt_tag(tag.group(), name), svg)
    head = f'<svg role="img" aria-label="{escape(description)}" class="figure"'
    return re.sub(r"^<svg(?= )", head, svg).strip()


def _adapt_tag(tag: str, name: str) -> str:
    # matplotlib counts ids from 1 in every figure; two figures in a page would share them, and their clip paths.
    tag = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", tag)
    if tag.startswith("<svg"):
        tag = re.sub(r'\s(width|height)="[^"]*"', "", tag)  # the page sets the width, the view box the shape
    tag = re.sub(r"(font: [^;]*?px) [^;]*", r"\1 sans-serif", tag)
    return re.sub(r"#[0-9a-f]{6}\b", lambda c: f"var(--{CSS_NAMES[c[0]]}, {c[0]})" if c[0] in CSS_NAMES else c[0], tag)
