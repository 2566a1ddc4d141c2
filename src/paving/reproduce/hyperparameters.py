"""Tables 5 and 7: what a run was set to beside what the paper says, and how operating points were chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paving.reproduce.protocol import (
    COMPONENTS,
    Field,
    assembled,
    edited_layers,
    expected_layers,
    layers_text,
    unsaid,
    value_text,
)
from paving.reproduce.published import Column, paper_name, published
from paving.reproduce.result import Block, Cell, PaperLine, Reproduction, line, missing, text, unavailable
from paving.reproduce.runs import Run, Setting
from paving.reproduce.variants import leaves, short_name

SAME, OTHER, OWN, UNCOMPARED = "same", "differs", "its own", "not comparable"
VALUE, AGREES = Column(heading="Value", unit=""), Column(heading="Agrees", unit="")

COMPARATORS = "stands in docs/comparators.md: what is fitted, its scales, and the two rules that choose among them"


def table_5(settings: Sequence[Setting]) -> Reproduction:
    """Every hyperparameter of the run, component by component, and whether it is the paper's."""
    paper = published("5")
    head = paper.blocks[0]
    columns = (VALUE, AGREES)
    blocks = []
    for setting in settings:
        lines = []
        for row in head.rows:
            component, printed = row[0], row[1]
            value, agrees = component_of(setting, component)
            beside = [PaperLine(name="paper", cells={"Value": printed, "Agrees": ""})]
            lines.append(line(component, columns, {"Value": value, "Agrees": text(agrees)}, beside))
        blocks.append(Block(title=setting.name, columns=columns, lines=tuple(lines), beside=True))
    notes = [f"{s.name} had to choose what the paper leaves open: {unsaid(s)}." for s in settings]
    notes.append("Thresholds and scales come out of calibration, each run's own: they are no settings to agree on.")
    return assembled(paper, settings, blocks, notes)


def component_of(setting: Setting, component: str) -> tuple[Cell, str]:
    """A row of table 5: what this setting has there, and one word on whether that is the paper's."""
    match component:
        case "Backbone":
            ours = setting.config.model
            return text(short_name(ours)), SAME if paper_name(ours) == "Gemma-3-4B-IT" else OTHER
        case "Intervention layers":
            return _edit_layers(setting)
        case "Gate policy":
            return _each_run(setting, lambda r: r.deployed.policy if r.deployed else None), OWN
        case "Gate threshold τ":
            return _each_run(setting, lambda r: f"{r.metrics.router.threshold:.4f}" if r.metrics else None), OWN
        case "Veto threshold τ_v":
            return _veto_threshold(setting), OWN
        case "Evaluation scale s":
            return _scales(setting), OWN
        case "Batching":
            rows = setting.config.training.rows_per_step
            return text(f"{value_text(rows)} edit/benign/harmful prompts a step"), UNCOMPARED
    ours = leaves(setting.config)
    fields = COMPONENTS[component]
    shown = [_field_text(component, f, ours[f.leaf]) for f in fields]
    return text(*(f"{s};" for s in shown[:-1]), shown[-1]), SAME if all(ours[f.leaf] == f.value for f in fields) else OTHER


def table_7(settings: Sequence[Setting]) -> Reproduction:
    """Search ranges and selection rules: this library's, from the run's calibration settings."""
    paper = published("7")
    head = paper.blocks[0]
    blocks = []
    for setting in settings:
        lines = []
        for row in head.rows:
            method = row[0]
            beside = [PaperLine(name="paper", cells=dict(zip((c.heading for c in head.columns[1:]), row[1:], strict=True)))]
            if not method.startswith("Residual Paving"):
                lines.append(unavailable(method, head.values, COMPARATORS, beside))
                continue
            cells = _oracle_rule(setting) if method.endswith("oracle") else _learned_rule(setting)
            lines.append(line(method, head.values, cells, beside))
        blocks.append(Block(title=setting.name, columns=head.values, lines=tuple(lines)))
    return assembled(paper, settings, blocks)


# --- table 5 --------------------------------------------------------------------------------------------------------


def _field_text(component: str, field: Field, value: object) -> str:
    if component == "Route layers":
        return layers_text(value)
    # What the row is called already is not said twice.
    return value_text(value) if field.words in component.lower() else f"{field.words} {value_text(value)}"


def _each_run(setting: Setting, of: Callable[[Run], str | None]) -> Cell:
    """One value a seed, told once where all are the same."""
    if (run := setting.unevaluated) is not None:
        return missing(f"{run.name} is not evaluated yet. Make it: paving eval {run.folder}")
    values = [of(r) or "n/a" for r in setting.runs]
    return text(", ".join(dict.fromkeys(values)) if len(set(values)) == 1 else ", ".join(values))


def _veto_threshold(setting: Setting) -> Cell:
    if setting.unevaluated is None and all(r.metrics.router.veto_threshold is None for r in setting.runs if r.metrics):
        return missing(f"{setting.name} has no veto in its deployed row")

    def threshold(run: Run) -> str | None:
        value = run.metrics.router.veto_threshold if run.metrics else None
        return None if value is None else f"{value:.4f}"

    return _each_run(setting, threshold)


def _scales(setting: Setting) -> Cell:
    chosen = _each_run(setting, lambda r: f"{r.deployed.scale:g}" if r.deployed and r.deployed.scale is not None else None)
    searched = ", ".join(f"{s:g}" for s in setting.config.calibration.scales)
    if chosen.missing:
        return Cell(lines=(f"n/a, selected from {{{searched}}}",), missing=chosen.missing)
    return text(f"{chosen.lines[0]},", f"selected from {{{searched}}}")


def _edit_layers(setting: Setting) -> tuple[Cell, str]:
    run = setting.runs[0]
    ours, theirs = edited_layers(run), expected_layers(setting.config.model, run.n_layers)
    if ours is None:
        return missing(f"{run.name} is not trained yet. Make it: paving train --out {run.folder} ..."), OTHER
    if theirs is None:
        return text(layers_text(ours)), UNCOMPARED
    by_rule = ours == tuple(range(theirs[0], theirs[1] + 1))
    if paper_name(setting.config.model):
        return text(layers_text(ours)), SAME if by_rule else OTHER
    return text(layers_text(ours), f"of {run.n_layers} blocks"), "same rule" if by_rule else OTHER


# --- table 7 --------------------------------------------------------------------------------------------------------


def _learned_rule(setting: Setting) -> dict[str, Cell]:
    calibration = setting.config.calibration
    scales = ", ".join(f"{s:g}" for s in calibration.scales)
    chosen = _each_run(setting, lambda r: f"s = {r.deployed.scale:g}, {r.deployed.policy}" if r.deployed else None)
    veto = "veto fitted on harmful keeps" if calibration.use_veto else "no veto"
    return {
        "Fitted object": text(f"K = {setting.config.controller.n_experts} bottleneck residual experts plus learned router"),
        "Search range": text(f"s in {{{scales}}};", f"{', '.join(calibration.policies)} routes; {veto}"),
        "Selection rule": Cell(
            lines=(
                f"On at most {calibration.max_edit_prompts} edit prompts and all keeps of the calibration split: safe "
                "non-refusal + 0.10 (target alignment + benign + harmful preservation) "
                f"- {calibration.harmful_cost:g} lost harmful refusals;",
                "scale with edit prompts routed by label, then the first policy in that order within one standard error;",
                f"chosen: {chosen.lines[0]}",
            ),
            missing=chosen.missing,
        ),
    }


def _oracle_rule(setting: Setting) -> dict[str, Cell]:
    return {
        "Fitted object": text("the same experts and mixture; the held-out label replaces the scalar gate only"),
        "Search range": text("the learned route's scale"),
        "Selection rule": text("a diagnostic; it cannot be saved as a gate policy"),
    }
