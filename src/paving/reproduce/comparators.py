"""Table 18, first block: the one-direction steering comparators, from `paving compare`."""

from __future__ import annotations

from collections.abc import Sequence

from paving.prompts.types import Bucket
from paving.reproduce import measures
from paving.reproduce.measures import drift, gate_active, paper_line, preservation, share
from paving.reproduce.protocol import assembled
from paving.reproduce.published import published
from paving.reproduce.result import Block, Cell, Reproduction, line, unavailable
from paving.reproduce.runs import BASE, Setting

EDIT, BENIGN, HARMFUL = Bucket
NO_RUN = "no run was given. Compare one: paving compare RUN, then paving reproduce 18 --runs RUN"
# The paper's names -> METHOD/VARIANT of `paving compare`. Its DIM-style direction leads from harmful to benign keeps.
ROWS = {
    "Edit-target ActAdd": "act-add/global",
    "Edit-target ActAdd + veto": "act-add/probe+veto",
    "Edit-target oracle ActAdd": "act-add/oracle",
    "DIM-style refusal direction": "dim-act-sub/global",
    "DIM-style refusal direction + veto": "dim-act-sub/probe+veto",
    "DIM-style oracle refusal direction": "dim-act-sub/oracle",
}


def table_18(settings: Sequence[Setting]) -> Reproduction:
    """Each row at the scale that the strict rule took; beside the paper's, whose selection is preservation-aware too."""
    paper = published("18")
    head = paper.blocks[0]
    blocks = []
    for setting in settings:
        beside = {row[0]: [paper_line(paper, head, row, setting.config.model)] for row in head.rows}
        lines = [line(name, head.values, _cells(setting, ROWS[name]), beside[name]) for name in beside]
        blocks.append(Block(title=setting.name, columns=head.values, lines=tuple(lines)))
    if not blocks:
        lines = [unavailable(row[0], head.values, NO_RUN, [paper_line(paper, head, row, "")]) for row in head.rows]
        blocks.append(Block(title=head.title, columns=head.values, lines=tuple(lines)))
    return assembled(paper, settings, blocks)


def _cells(setting: Setting, row: str) -> dict[str, Cell]:
    return {
        "Scale": measures.scale(setting, row),
        "Base edit ref.": share(setting, BASE, EDIT),
        "Edit ref.": share(setting, row, EDIT),
        "Benign pres.": preservation(setting, row, BENIGN),
        "Harmful pres.": preservation(setting, row, HARMFUL),
        "Base harm ref.": share(setting, BASE, HARMFUL),
        "Harm ref.": share(setting, row, HARMFUL),
        "Harm Δ": drift(setting, row),
        "Benign active": gate_active(setting, row, BENIGN),
        "Harmful active": gate_active(setting, row, HARMFUL),
    }
