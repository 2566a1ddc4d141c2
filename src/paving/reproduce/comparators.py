"""Table 18, first block: the one-direction steering comparators, of which none can be measured yet."""

from __future__ import annotations

from collections.abc import Sequence

from paving.reproduce.measures import paper_line
from paving.reproduce.protocol import assembled
from paving.reproduce.published import published
from paving.reproduce.result import Block, Reproduction, unavailable
from paving.reproduce.runs import Setting

NO_STEERING = "steering comparators are not there yet (issue 5 brings them)"


def table_18(settings: Sequence[Setting]) -> Reproduction:
    """Every cell is n/a with the reason, beside the paper's."""
    paper = published("18")
    head = paper.blocks[0]
    model = settings[0].config.model if settings else ""
    lines = [unavailable(row[0], head.values, NO_STEERING, [paper_line(paper, head, row, model)]) for row in head.rows]
    return assembled(paper, settings, [Block(title=head.title, columns=head.values, lines=tuple(lines))])
