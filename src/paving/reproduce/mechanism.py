"""Table 4: where the edit moves the residual stream, run by run, from diagnostics.json."""

from __future__ import annotations

from collections.abc import Sequence

from paving.evaluation.diagnostics.records import Spread, TrajectoryRecord
from paving.prompts.types import Bucket
from paving.reproduce import measures
from paving.reproduce.diagnosed import BasePath, base_path, lacking, trajectory_of
from paving.reproduce.protocol import assembled
from paving.reproduce.published import paper_name, published
from paving.reproduce.result import Block, Cell, PaperLine, Reproduction, line, missing, nothing_to_say, text
from paving.reproduce.runs import Setting, single

GROUPS = {Bucket.EDIT: "Edit", Bucket.BENIGN_KEEP: "Benign keep", Bucket.HARMFUL_KEEP: "Harmful keep"}
ALIGNED = ("Edit align.", "Refusal align.")


def table_4(settings: Sequence[Setting]) -> Reproduction:
    paper = published("4")
    head = paper.blocks[0]
    blocks = []
    for run in single(settings):
        name = paper_name(run.config.model)
        lines = []
        for bucket, group in GROUPS.items():
            beside = [_printed(name, group, f"paper, {name}")] if name else []
            lines.append(line(group, head.values, _cells(run, bucket), beside))
        blocks.append(Block(title=run.name, columns=head.values, lines=tuple(lines), context=tuple(_others(name))))
    notes = [
        "Alignments are over held-out edit prompts whose gate opened, mean (standard deviation); closed gates count in RMS.",
        "The paper's refusal-like reference is one construction; here it is the base's own refusal, teacher-forced.",
        *_gaps(settings),
    ]
    return assembled(paper, settings, blocks, notes)


def _cells(run: Setting, bucket: Bucket) -> dict[str, Cell]:
    row = run.deployed
    cells = {
        "Active gate": measures.gate_active(run, row, bucket),
        "Veto block": measures.vetoed(run, row, bucket),
    }
    only = run.runs[0]
    if (found := trajectory_of(only)) is None:
        rest = (*ALIGNED, "Anchor NLL effect", "Base-path RMS")
        return cells | dict.fromkeys(rest, missing(lacking(only, "trajectories")))
    edited = bucket == Bucket.EDIT
    path = base_path(found, bucket)
    return cells | {
        "Edit align.": _spread(found.edit) if edited else nothing_to_say(),
        "Refusal align.": _spread(found.refusal) if edited else nothing_to_say(),
        "Anchor NLL effect": _nll(found) if edited else _added_nll(path, run.name),
        "Base-path RMS": _rms(path, f"{run.name} has no {bucket.value} prompts (n=0)"),
    }


def _spread(found: Spread) -> Cell:
    if found.mean is None:
        return missing("no gate opened on an edit prompt, so nothing moved (n=0)")
    sd = "n/a" if found.sd is None else f"{found.sd:.3f}"
    return text(f"{found.mean:.3f} ({sd})", f"(n={found.n})", value=found.mean)


def _nll(found: TrajectoryRecord) -> Cell:
    if found.nll_reduction is None:
        return missing("no gate opened on an edit prompt, so nothing moved (n=0)")
    return text(f"{-100 * found.nll_reduction:+.1f}%", "(NLL)", value=-100 * found.nll_reduction)


def _added_nll(path: BasePath | None, name: str) -> Cell:
    """Of keeps: nats per token of the base's own continuation, closed gates counted as 0."""
    if path is None or path.nll_delta.mean is None:
        return missing(f"{name} has no such prompts (n=0)")
    return text(f"{path.nll_delta.mean:+.3f} NLL", f"(n={path.nll_delta.n})", value=path.nll_delta.mean)


def _rms(path: BasePath | None, why: str) -> Cell:
    if path is None or path.rms.mean is None:
        return missing(why)
    sd = "" if path.rms.sd is None else f" ({path.rms.sd:.3g})"
    return text(f"{path.rms.mean:.3g}{sd}", f"(n={path.rms.n})", value=path.rms.mean)


def _gaps(settings: Sequence[Setting]) -> list[str]:
    """The claim of the table is the gap between the two cosines, not either of them."""
    told = []
    for run in single(settings):
        found = trajectory_of(run.runs[0])
        if found is not None and found.gap.mean is not None:
            told.append(f"{run.name}: edit-target minus refusal-like alignment {found.gap.mean:+.3f} (n={found.gap.n}).")
    return told


def _others(name: str | None) -> list[PaperLine]:
    others = [n for n in dict.fromkeys(row[0] for row in published("4").blocks[0].rows) if n != name]
    return [_printed(n, g, f"paper, {n}, {g.lower()} (another backbone)") for n in others for g in GROUPS.values()]


def _printed(name: str, group: str, called: str) -> PaperLine:
    head = published("4").blocks[0]
    return PaperLine(name=called, cells={c.heading: head.cell(c.heading, name, group) for c in head.values})
