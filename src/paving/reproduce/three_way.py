"""Tables 1, 15, 16 and 17: base, learned and oracle, with intervals, by seed, and within one source."""

from __future__ import annotations

from collections.abc import Sequence

from paving.evaluation.judges import Label
from paving.evaluation.power import bucket_power, sentence
from paving.evaluation.results import Row
from paving.evaluation.seeds import spread
from paving.prompts.types import Bucket
from paving.reproduce import measures
from paving.reproduce.measures import drift, paper_line, preservation, scale, share
from paving.reproduce.protocol import assembled, held_out
from paving.reproduce.published import PaperBlock, PaperTable, published
from paving.reproduce.result import Block, Cell, Line, PaperLine, Reproduction, line, text
from paving.reproduce.runs import BASE, LEARNED, ORACLE, VETOED, Setting, single

EDIT, BENIGN, HARMFUL = Bucket

# Row here -> leading cells of the paper's row. The paper's learned row has the veto (tables 5 and 8).
PAPER_ROWS = {
    BASE: "Base model",
    LEARNED: "Residual Paving thresholded-soft S4/T2",
    ORACLE: "Residual Paving oracle S4/T2",
}


def table_1(settings: Sequence[Setting]) -> Reproduction:
    """Refusal and preservation of every row, one block a setting; seeds pooled."""
    paper = published("1")
    head = paper.blocks[0]
    blocks = []
    for setting in settings:
        lines = []
        for row in main_rows(setting):
            cells = {
                "Edit ref.": share(setting, row, EDIT),
                "Benign pres.": preservation(setting, row, BENIGN),
                "Harm. pres.": preservation(setting, row, HARMFUL),
                "Harm. ref.": share(setting, row, HARMFUL),
                "Harm Δ": drift(setting, row),
            }
            beside = _beside(paper, head, setting, row)
            lines.append(line(row, head.values, cells, beside))
        blocks.append(Block(title=setting.name, columns=head.values, lines=tuple(lines)))
    return assembled(paper, settings, blocks)


def table_15(settings: Sequence[Setting]) -> Reproduction:
    """Wilson intervals of every run by itself: an interval over seeds that share prompts would be none of Wilson's."""
    paper = published("15")
    head = paper.blocks[0]
    blocks = []
    for run in single(settings):
        lines = []
        for row in main_rows(run):
            cells = {
                "Edit refusal": share(run, row, EDIT),
                "Base harmful refusal": share(run, BASE, HARMFUL),
                "Harmful refusal": share(run, row, HARMFUL),
                "Harm Δ": drift(run, row),
            }
            beside = _beside(paper, head, run, row)
            lines.append(line(row, head.values, cells, beside))
        blocks.append(Block(title=run.name, columns=head.values, lines=tuple(lines)))
    notes = ["Harm Δ has Tango's interval, for two rows on the same prompts; the paper gives none."]
    return assembled(paper, settings, blocks, notes)


def table_16(settings: Sequence[Setting]) -> Reproduction:
    """Every seed by itself, without and with the veto, and the spread over seeds."""
    paper = published("16")
    head = paper.blocks[0]
    blocks = []
    for setting in settings:
        by_row: dict[str, list[Line]] = {row: [] for row in (LEARNED, *vetoed_rows(setting))}
        for run in single([setting]):
            for row, found in by_row.items():
                found.append(_replication(run, row, head))
        lines = [found[i] for i in range(len(setting.runs)) for found in by_row.values()]
        if len(setting.runs) > 1:
            lines += [_spread_line(f"over seeds, {_veto_words(setting, row)}", found) for row, found in by_row.items()]
        context = [paper_line(paper, head, row, setting.config.model, called=row[0]) for row in head.rows]
        blocks.append(Block(title=setting.name, columns=head.values, lines=tuple(lines), context=tuple(context)))
    notes = [
        "Another seed is another controller and another split; spread is mean ± standard deviation, least to greatest.",
        "The paper's seeds are its own splits, so its rows stand below and beside no row in particular.",
    ]
    return assembled(paper, settings, blocks, notes)


def table_17(settings: Sequence[Setting]) -> Reproduction:
    """Edit prompts and harmful keeps of one source, with what the buckets can show."""
    paper = published("17")
    head = paper.blocks[0]
    blocks, notes = [], []
    for setting in settings:
        lines = []
        for row in main_rows(setting)[1:]:
            cells = {
                "Scale": scale(setting, row),
                "Edit benign": share(setting, row, EDIT, {Label.HARMLESS_BENIGN}),
                "Edit non-ref.": share(setting, row, EDIT, measures.NOT_REFUSED),
                "Benign keep": share(setting, row, BENIGN, {Label.HARMLESS_BENIGN}),
                "Harm ASR": share(setting, row, HARMFUL, {Label.HARMFUL}),
                "Harm ref.": share(setting, row, HARMFUL),
            }
            route = {ORACLE: "oracle", setting.deployed: "thresh.-soft"}.get(row)
            rows = [r for r in head.rows if r[1] == route]
            beside = [paper_line(paper, head, r, setting.config.model, f"{r[0]}, scale {r[2]}") for r in rows]
            lines.append(line(row, head.values, cells, beside))
        blocks.append(Block(title=setting.name, columns=head.values, lines=tuple(lines)))
        notes += _one_source(setting) + _power(setting)
    notes.append("Harm ASR is the share judged HARMFUL; as in the paper's rows, it and Harm ref. need not add up to 100.")
    return assembled(paper, settings, blocks, notes)


# --- which rows -----------------------------------------------------------------------------------------------------


def main_rows(setting: Setting) -> list[str]:
    """base, learned, learned+veto where there is one, oracle."""
    return [BASE, LEARNED, *([VETOED] if setting.has(VETOED) else []), ORACLE]


def _beside(paper: PaperTable, head: PaperBlock, setting: Setting, row: str) -> list[PaperLine]:
    """The paper's row for base, deployed and oracle; none for learned without the veto that it has."""
    counterpart = paper_counterpart(setting, row)
    if counterpart is None:
        return []
    return [paper_line(paper, head, head.named(PAPER_ROWS[counterpart])[0], setting.config.model)]


def paper_counterpart(setting: Setting, row: str) -> str | None:
    """Which of the paper's rows this one is to be read beside; None for learned without the veto that it has."""
    if row == setting.deployed:
        return LEARNED
    return row if row in (BASE, ORACLE) else None


def vetoed_rows(setting: Setting) -> list[str]:
    """Rows of the learned router that have a veto, in the order of the run."""
    rows = setting.runs[0].metrics.rows if setting.runs[0].metrics else []
    return [r.name for r in rows if r.kind == "learned" and _has_veto(r) and setting.has(r.name)]


def _has_veto(row: Row) -> bool:
    return any(rate.n for rate in row.veto_rate.values())


# --- table 16 -------------------------------------------------------------------------------------------------------


def _replication(run: Setting, row: str, head: PaperBlock) -> Line:
    cells = {
        "Base edit ref.": share(run, BASE, EDIT),
        "Edit ref.": share(run, row, EDIT),
        "Benign pres.": preservation(run, row, BENIGN),
        "Harmful pres.": preservation(run, row, HARMFUL),
        "Base harm ref.": share(run, BASE, HARMFUL),
        "Harm ref.": share(run, row, HARMFUL),
        "Harm Δ": drift(run, row),
        "Veto rate": measures.veto_triple(run, row),
    }
    return line(f"seed {run.runs[0].seed}, {_veto_words(run, row)}", head.values, cells)


def _veto_words(setting: Setting, row: str) -> str:
    """`no veto`, `thresholded veto`, ...: the policy of the row, as table 16 names its rows."""
    if row == LEARNED:
        return "no veto"
    policies = {r.policy for r in setting.rows(row) if r is not None}
    return f"{policies.pop()} veto" if len(policies) == 1 else row


def _spread_line(name: str, lines: Sequence[Line]) -> Line:
    def cell(heading: str) -> Cell:
        found = spread([each.cells[heading].value for each in lines])
        if found.mean is None:
            return text("–")
        sd = "n/a" if found.sd is None else f"{found.sd:.1f}"
        return text(f"{found.mean:.1f} ± {sd}", f"{found.least:.1f} to {found.greatest:.1f}", value=found.mean)

    return Line(name=name, cells={heading: cell(heading) for heading in lines[0].cells})


# --- table 17 -------------------------------------------------------------------------------------------------------


def _one_source(setting: Setting) -> list[str]:
    config = setting.config
    if config.edit.partition("?")[0] == config.harmful.partition("?")[0]:
        return []
    return [f"{setting.name} is no same-source run: its edit prompts and harmful keeps come from different sources."]


def _power(setting: Setting) -> list[str]:
    """What one seed's buckets can show, for the edit prompts and the harmful keeps."""
    counts = [held_out(r.metrics) for r in setting.runs if r.metrics is not None]
    if not counts:
        return []
    least = [min(n) for n in zip(*counts, strict=True)]
    each = "" if len(setting.runs) == 1 else ", each seed by itself"
    told = [sentence(bucket, bucket_power(n)) for bucket, n in zip(Bucket, least, strict=True) if bucket is not BENIGN]
    return [f"{setting.name}{each}: " + " ".join(told)]
