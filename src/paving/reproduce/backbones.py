"""Tables 3 and 6: learned against oracle routing on every backbone, and the layers and scales of each."""

from __future__ import annotations

from collections.abc import Sequence

from paving.evaluation.seeds import sign_test
from paving.presets import preset_for
from paving.prompts.types import Bucket
from paving.reproduce import measures
from paving.reproduce.measures import drift, paper_line, preservation, share
from paving.reproduce.protocol import assembled, edited_layers, layers_text
from paving.reproduce.published import BACKBONES, PaperBlock, PaperTable, paper_name, published
from paving.reproduce.result import Block, Cell, Line, PaperLine, Reproduction, line, missing, text
from paving.reproduce.runs import BASE, ORACLE, Setting
from paving.reproduce.variants import short_name

EDIT, BENIGN, HARMFUL = Bucket


def table_3(settings: Sequence[Setting]) -> Reproduction:
    """A learned/oracle pair a setting, the keep-side gain, and the sign test over backbones."""
    paper = published("3")
    head = paper.blocks[0]
    lines, gains = [], {}
    for setting in settings:
        name, model = paper_name(setting.config.model), setting.config.model
        gain = keep_side_gain(setting)
        gains.setdefault(name or model, gain.value)  # one vote a backbone, however many settings it has
        for row, route in ((setting.deployed, "Learned"), (ORACLE, "Oracle")):
            beside = [_own(paper, head, name, route)] if name else []
            cells = _routing_cells(setting, row, gain if row == ORACLE else text(""))
            lines.append(line(f"{setting.name}: {name or short_name(model)}, {row}", head.values, cells, beside))
    measured = {paper_name(s.config.model) for s in settings}
    context = [
        PaperLine(name=f"paper, {row[0]}, {row[1].lower()} (another backbone)", cells=_printed(head, row))
        for row in head.rows
        if row[0] not in measured
    ]
    block = Block(title="Learned and oracle routing", columns=head.values, lines=tuple(lines), context=tuple(context))
    return assembled(paper, settings, [block], [sign_sentence(list(gains.values())), *_one_vote(settings)])


def keep_side_gain(setting: Setting) -> Cell:
    """(oracle P_B + oracle R_H) - (learned P_B + learned R_H), in percentage points (table 3)."""
    rows = (ORACLE, setting.deployed)
    oracle, learned = ((preservation(setting, r, BENIGN), share(setting, r, HARMFUL)) for r in rows)
    if any(c.value is None for c in (*oracle, *learned)):
        return missing(next(c.missing for c in (*oracle, *learned) if c.value is None) or "")
    gain = sum(c.value for c in oracle) - sum(c.value for c in learned)
    return text(f"{gain:+.1f}", value=gain)


def sign_sentence(gains: Sequence[float | None]) -> str:
    """The one-sided sign test over backbones, and what so few of them can show."""
    found = sign_test(gains)
    if found.p is None:
        return "Sign test over backbones: n/a, no backbone has a keep-side gain above or below 0."
    n = found.positive + found.negative
    told = (
        f"Sign test over backbones, one-sided: {found.positive} of {n} with a gain, p = {found.p:.3f}; median gain "
        f"{found.median:+.1f} pp (in the paper 6 of 6, p = 0.016, median +12.9 pp)."
    )
    return told + (" Fewer than five backbones cannot come below p = 0.05." if n < 5 else "")


def table_6(settings: Sequence[Setting]) -> Reproduction:
    """The presets of `paving models` beside the paper's windows and scales, and what the given runs used."""
    paper = published("6")
    head = paper.blocks[0]
    lines = [_preset_line(head, row) for row in head.rows]
    blocks = [Block(title="presets (paving models)", columns=head.values, lines=tuple(lines), beside=True)]
    if settings:
        used = [_used_line(head, setting) for setting in settings]
        blocks.append(Block(title="given runs", columns=head.values, lines=tuple(used), beside=True))
    wrong = [ln.name for ln in lines if any(ln.cells[h].lines[0] != ln.paper[0].cells[h] for h in ln.cells)]
    verdict = f"Presets that are not the paper's: {', '.join(wrong)}." if wrong else "Every preset is the paper's."
    return assembled(paper, settings, blocks, [verdict])


# --- rows -----------------------------------------------------------------------------------------------------------


def _routing_cells(setting: Setting, row: str, gain: Cell) -> dict[str, Cell]:
    return {
        "Scale": measures.scale(setting, row),
        "Base edit ref.": share(setting, BASE, EDIT),
        "Edit ref.": share(setting, row, EDIT),
        "Benign pres.": preservation(setting, row, BENIGN),
        "Harmful pres.": preservation(setting, row, HARMFUL),
        "Harm ref.": share(setting, row, HARMFUL),
        "Harm Δ": drift(setting, row),
        "Keep-side gain": gain,
    }


def _own(paper: PaperTable, head: PaperBlock, name: str, route: str) -> PaperLine:
    return paper_line(paper, head, head.named(name, route)[0], BACKBONES[name], called=name)


def _printed(head: PaperBlock, row: Sequence[str]) -> dict[str, str]:
    return {c.heading: printed for c, printed in zip(head.columns, row, strict=True) if c in head.values}


def _one_vote(settings: Sequence[Setting]) -> list[str]:
    models = [paper_name(s.config.model) or s.config.model for s in settings]
    if len(set(models)) == len(models):
        return []
    return ["A backbone with several settings has one vote in the sign test: that of the first one given."]


def _preset_line(head: PaperBlock, row: Sequence[str]) -> Line:
    preset = preset_for(BACKBONES[row[0]])
    paper = [PaperLine(name="paper", cells=_printed(head, row))]
    if preset is None:
        cells = dict.fromkeys((c.heading for c in head.values), missing(f"no preset for {row[0]} in paving.presets"))
        return line(row[0], head.values, cells, paper)
    cells = {
        "Route layers": text(layers_text(preset.route_layers)),
        "Intervention layers": text(f"{preset.edit_layers[0]}-{preset.edit_layers[1]}"),
        "Scale": text("calibrated" if preset.scale is None else f"{preset.scale:g}", value=preset.scale),
    }
    return line(row[0], head.values, cells, paper)


def _used_line(head: PaperBlock, setting: Setting) -> Line:
    run, name = setting.runs[0], paper_name(setting.config.model)
    edited = edited_layers(run)
    untrained = missing(f"{run.name} is not trained yet. Make it: paving train --out {run.folder} ...")
    cells = {
        "Route layers": text(layers_text(setting.config.controller.route_layers)),
        "Intervention layers": text(layers_text(edited)) if edited else untrained,
        "Scale": measures.scale(setting, setting.deployed),
    }
    row = head.named(name)[0] if name else None
    paper = [PaperLine(name="paper", cells=_printed(head, row))] if row else []
    return line(f"{setting.name}: {name or short_name(setting.config.model)}", head.values, cells, paper)
