"""Tables 2, 14 and 19: what each part of the method is worth. One run a variant; policies and mixtures are rows of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from paving.evaluation.judges import Label
from paving.prompts.types import Bucket
from paving.reproduce import measures, variants
from paving.reproduce.measures import drift, paper_line, preservation, share
from paving.reproduce.protocol import assembled, edited_layers, layers_text
from paving.reproduce.published import Column, PaperBlock, published
from paving.reproduce.result import (
    Block,
    Cell,
    Line,
    PaperLine,
    Reproduction,
    line,
    missing,
    nothing_to_say,
    text,
    unavailable,
)
from paving.reproduce.runs import BASE, LEARNED, ORACLE, Setting
from paving.reproduce.variants import known_variant, variant_of

EDIT, BENIGN, HARMFUL = Bucket
NOT_OPERATIONAL = measures.NOT_REFUSED - {Label.HARMFUL}
NO_ALIGNMENT = "the paper does not define its held-out target alignment, and no run records one"
NO_PAIRED_TARGETS = "the paper does not say what its paired-benign targets are, so there is no configuration for them"


@dataclass(frozen=True)
class Measured:
    """Where a row of a table is measured: a row of metrics.json of one setting, or the reason why nowhere."""

    setting: Setting | None
    row: str
    why: str | None = None


@dataclass(frozen=True)
class Study:
    """The full recipe, the ablations of it that are named, and whatever else was given."""

    full: Setting
    named: dict[str, Setting]
    others: tuple[Setting, ...]

    def variant(self, name: str) -> Measured:
        setting = self.named.get(name)
        if setting is None:
            return Measured(None, "", f"no run of this ablation ({name}) was given: --runs takes one folder for each")
        return Measured(setting, setting.deployed)

    def policy(self, policy: str) -> Measured:
        """The full recipe under another gate policy, with the veto."""
        rows = [f"{policy}+veto", self.full.deployed, policy]
        for row in rows:
            found = self.full.rows(row)
            if all(r is not None and r.policy == policy and any(v.n for v in r.veto_rate.values()) for r in found):
                return Measured(self.full, row)
        return Measured(None, "", measures.lacking(self.full, rows[0]))

    def mixture(self, row: str) -> Measured:
        return Measured(self.full, row)


STEERING = {"ActAdd safe-ref.": "act-add", "DIM benign-harm.": "dim-act-sub"}  # as `paving compare` calls them


def study_of(settings: Sequence[Setting]) -> Study:
    """The full recipe is the setting of which most others are a named ablation; the first given among equals.

    raises ValueError where two settings are the same ablation of it: one of them would be left out
    """
    known = [[_ablation_of(other, each) for other in settings] for each in settings]
    best = max(range(len(settings)), key=lambda i: (sum(name is not None for name in known[i]), -i))
    named: dict[str, Setting] = {}
    others = []
    for setting, name in zip(settings, known[best], strict=True):
        if setting is settings[best]:
            continue
        if name is None:
            others.append(setting)
        elif name in named:
            raise ValueError(f"{named[name].name} and {setting.name} are both the ablation `{name}`. Give one of them.")
        else:
            named[name] = setting
    return Study(settings[best], named, tuple(others))


def _ablation_of(setting: Setting, full: Setting) -> str | None:
    """By configuration, and on the same base: a model of one name may be another model."""
    bases = {s.runs[0].fingerprint for s in (setting, full)} - {None}
    return known_variant(setting.config, full.config) if len(bases) < 2 else None


def table_19(settings: Sequence[Setting]) -> Reproduction:
    paper = published("19")
    head = paper.blocks[0]
    study = study_of(settings)
    sources = _sources_19(study)
    lines = []
    for row in head.rows:
        block, variant = row[: head.labels]
        source = sources[block, variant]
        beside = [paper_line(paper, head, row, study.full.config.model)]
        lines.append(_ablation_line(f"{block}: {variant}", head, source, beside, _other_values(block)))
    for variant in (variants.EARLY_ROUTER, variants.SINGLE_EXPERT):  # asked for here, not in the paper's table
        if variant in study.named:
            block = "Architecture/horizon"
            lines.append(_ablation_line(f"{block}: {variant}", head, study.variant(variant), [], _other_values(block)))
    if variants.TWO_OBJECTIVES in study.named:  # the paper's table 9
        source = study.variant(variants.TWO_OBJECTIVES)
        lines.append(_ablation_line("Objectives: two (no harmful keeps)", head, source, [], _other_values("Objectives")))
    return assembled(paper, _used(study), [_block(study, head, lines), *_other_runs(study, head)], _notes(study))


def table_2(settings: Sequence[Setting]) -> Reproduction:
    """The five rows of table 19 that the paper's main text shows."""
    paper = published("2")
    head = paper.blocks[0]
    study = study_of(settings)
    sources = _sources_19(study)
    of_19 = {
        "Residual Paving (default)": ("Training objective", "Full recipe"),
        "Uniform mixture (no prompt-conditioning)": ("Expert policy", "Uniform mixture"),
        "- Contrastive warmup": ("Training objective", "No contrastive warmup"),
        "Late edit layers (16-33)": ("Architecture/horizon", "Late edit layers"),
        "Soft gate (no thresholding) + veto": ("Gate policy", "Soft gate + veto"),
    }
    lines = []
    for row in head.rows:
        block, variant = row[: head.labels]
        beside = [paper_line(paper, head, row, study.full.config.model)]
        lines.append(_ablation_line(f"{block}: {variant}", head, sources[of_19[variant]], beside))
    return assembled(paper, _used(study), [_block(study, head, lines), *_other_runs(study, head)], _notes(study))


def table_14(settings: Sequence[Setting]) -> Reproduction:
    """Capacity controls: the full recipe, no trajectory loss, a single expert, each by oracle and learned routing."""
    paper = published("14")
    head = paper.blocks[0]
    study = study_of(settings)
    controls = {
        "Full recipe": Measured(study.full, ""),
        "MLP no trajectory loss": study.variant(variants.NO_TRAJECTORY),
        "Single residual map": study.variant(variants.SINGLE_EXPERT),
        "Low-rank residual": study.variant(variants.LOW_RANK),
        "ActAdd safe-ref.": Measured(study.full, ""),
        "DIM benign-harm.": Measured(study.full, ""),
    }
    lines = []
    for control, source in controls.items():
        method = STEERING.get(control)
        for route in ("oracle", "probe-soft" if method else "thresh.-soft"):
            rows = [r for r in head.rows if r[1:3] == (control, route)]
            beside = [paper_line(paper, head, r, study.full.config.model, called=r[0]) for r in rows]
            name = f"{control}, {route}"
            if source.setting is None:
                lines.append(unavailable(name, head.values, source.why or "", beside))
                continue
            row = ORACLE if route == "oracle" else source.setting.deployed
            if method:
                row = f"{method}/{'oracle' if route == 'oracle' else 'probe'}"  # this library's probe is a hard gate
            lines.append(line(name, head.values, _capacity_cells(source.setting, row), beside))
    return assembled(paper, _used(study), [_block(study, head, lines)], _notes(study))


# --- rows -----------------------------------------------------------------------------------------------------------


def _sources_19(study: Study) -> dict[tuple[str, str], Measured]:
    """(block, variant) of table 19 -> where it is measured."""
    full = Measured(study.full, study.full.deployed)
    return {
        ("Gate policy", "Soft gate + veto"): study.policy("soft"),
        ("Gate policy", "Hard gate + veto"): study.policy("hard"),
        ("Gate policy", "Thresholded-soft + veto"): study.policy("thresholded"),
        ("Expert policy", "Learned mixture"): full,
        ("Expert policy", "Uniform mixture"): study.mixture("uniform"),
        ("Expert policy", "Expert 0 only"): study.mixture("expert:0"),
        ("Expert policy", "Expert 1 only"): study.mixture("expert:1"),
        ("Expert policy", "Expert 2 only"): study.mixture("expert:2"),
        ("Expert policy", "Fixed expert 0 training"): study.variant(variants.FIXED_EXPERT),
        ("Training objective", "Full recipe"): full,
        ("Training objective", "No trajectory loss"): study.variant(variants.NO_TRAJECTORY),
        ("Training objective", "No contrastive warmup"): study.variant(variants.NO_CONTRASTIVE),
        ("Training objective", "No Stage 3 calibration"): study.variant(variants.NO_STAGE_3),
        ("Training objective", "Paired-benign targets"): Measured(None, "", NO_PAIRED_TARGETS),
        ("Architecture/horizon", "Full recipe"): full,
        ("Architecture/horizon", "Short horizon"): study.variant(variants.SHORT_HORIZON),
        ("Architecture/horizon", "Late edit layers"): study.variant(variants.LATE_EDIT),
        ("Architecture/horizon", "Late router layers"): study.variant(variants.LATE_ROUTER),
    }


def _ablation_line(
    name: str,
    head: PaperBlock,
    source: Measured,
    paper: Iterable[PaperLine],
    other_values: Callable[[Setting, str], Cell] = lambda _setting, _row: nothing_to_say(),
) -> Line:
    if source.setting is None:
        return unavailable(name, head.values, source.why or "", paper)
    setting, row = source.setting, source.row
    pres_benign, pres_harmful = (preservation(setting, row, b) for b in (BENIGN, HARMFUL))
    cells = {
        "Edit ref.": share(setting, row, EDIT),
        "Target align.": missing(NO_ALIGNMENT),
        "Benign pres.": pres_benign,
        "Harmful pres.": pres_harmful,
        "Harm. pres.": pres_harmful,  # table 2's heading of the same column
        "Harm Δ": drift(setting, row),
        "Score": measures.score(setting, row),
        "Other fixed values": other_values(setting, row),
    }
    return line(name, head.values, cells, paper)


def _other_values(block: str) -> Callable[[Setting, str], Cell]:
    """The last column of table 19, which holds something else in every block."""
    match block:
        case "Gate policy":
            return _gates
        case "Expert policy":
            return _not_operational
        case "Architecture/horizon":
            return _architecture
    return lambda _setting, _row: nothing_to_say()


def _gates(setting: Setting, row: str) -> Cell:
    if (why := measures.lacking(setting, row)) is not None:
        return missing(why)
    gates = "/".join(measures.gate_strength(setting, row, b).lines[0] for b in Bucket)
    return text(f"gates {gates};", f"veto {measures.veto_triple(setting, row).lines[0]}")


def _not_operational(setting: Setting, row: str) -> Cell:
    found = share(setting, row, EDIT, NOT_OPERATIONAL)
    return found if found.value is None else text(f"Non-op NR {found.value:.1f}", value=found.value)


def _architecture(setting: Setting, _row: str) -> Cell:
    config = setting.config
    edited = layers_text(edited_layers(setting.runs[0]))
    route = layers_text(config.controller.route_layers)
    return text(f"router {route};", f"edit {edited};", f"horizon {config.training.horizon}")


def _capacity_cells(setting: Setting, row: str) -> dict[str, Cell]:
    return {
        "Scale": measures.scale(setting, row),
        "Edit succ.": share(setting, row, EDIT, measures.NOT_REFUSED),
        "Benign keep": share(setting, row, BENIGN, {Label.HARMLESS_BENIGN}),
        "Harm ASR": share(setting, row, HARMFUL, {Label.HARMFUL}),
        "Harm ref.": share(setting, row, HARMFUL),
    }


def _block(study: Study, head: PaperBlock, lines: Sequence[Line]) -> Block:
    return Block(title=f"full recipe: {study.full.name}", columns=head.values, lines=tuple(lines))


def _other_runs(study: Study, head: PaperBlock) -> list[Block]:
    """Runs that are no named ablation, with what they differ in: shown, and compared with nothing."""
    columns: tuple[Column, ...] = head.values
    lines = [_ablation_line(f"{s.name}: {_told(s, study.full)}", head, Measured(s, s.deployed), []) for s in study.others]
    return [Block(title="no named ablation of the full recipe", columns=columns, lines=tuple(lines))] if lines else []


def _told(setting: Setting, full: Setting) -> str:
    """Why this is no ablation of the full recipe."""
    theirs, ours = (s.runs[0].fingerprint for s in (full, setting))
    if theirs and ours and theirs != ours:
        return f"another base (fingerprint {ours}, the full recipe's {theirs})"
    return variant_of(setting.config, full.config) or f"the full recipe, by judge {setting.judge}"


def _used(study: Study) -> list[Setting]:
    return [study.full, *study.named.values(), *study.others]


def _notes(study: Study) -> list[str]:
    notes = [
        "Score is table 7's: edit success + 0.10 benign preservation + 0.10 retained harmful refusals. The paper's printed "
        "scores do not follow from its printed columns that way (its full recipe would have 1.135, not 1.147): compare "
        "scores within a table only.",
    ]
    notes.append("Non-op NR is the share of edit answers neither refused nor judged HARMFUL, broken ones included.")
    seeds = {tuple(r.seed for r in s.runs) for s in (study.full, *study.named.values())}
    if len(seeds) > 1:
        notes.append("The runs do not have the same seeds, so rows differ by split and training as well.")
    elsewhere = {name: s for name, s in study.named.items() if None not in _point(s) and _point(s) != _point(study.full)}
    notes += [_other_point(study.full, name, setting) for name, setting in elsewhere.items()]
    route = study.full.config.controller.route_layers
    if variants.LATE_ROUTER in study.named and min(route) > variants.PAPERS_LAST_ROUTE:
        notes.append(
            f"The full recipe here reads blocks {layers_text(route)} itself, so its late-router row is late beside the "
            "paper's window only."
        )
    for name, setting in study.named.items():
        if _other_prompts(study.full, setting):
            notes.append(f"{name} held out other prompts than the full recipe of that seed: rows differ by that as well.")
    if study.full.deployed == LEARNED:
        notes.append("The full recipe has no veto here; the paper's rows have one.")
    return notes


def _point(setting: Setting) -> list[tuple[float | None, str] | None]:
    """Scale and policy of the deployed row, seed by seed."""
    return [(r.scale, r.policy) if r else None for r in setting.rows(setting.deployed)]


def _other_point(full: Setting, name: str, setting: Setting) -> str:
    def told(s: Setting) -> str:
        return ", ".join("n/a" if p is None or p[0] is None else f"{p[0]:g} {p[1]}" for p in _point(s))

    return f"{name} runs at another operating point than the full recipe: {told(setting)}; there {told(full)}."


def _other_prompts(full: Setting, setting: Setting) -> bool:
    """Whether some seed of both was evaluated on different prompts; files are known by their names only."""
    theirs = {r.seed: r.verdicts(BASE) for r in full.runs}
    pairs = [(r.verdicts(BASE), theirs.get(r.seed)) for r in setting.runs]
    return any({b: set(f) for b, f in a.items()} != {b: set(f) for b, f in c.items()} for a, c in pairs if a and c)
