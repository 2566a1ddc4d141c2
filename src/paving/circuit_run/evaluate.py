"""A circuit's edit on held-out prompts: its category, benign prompts, other categories, other sources, and comparators."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from paving.backbone import Backbone
from paving.circuit.delta import Delta, with_metrics
from paving.circuit.delta_files import load_delta, save_delta, weights_sha256
from paving.circuit_run.config import CircuitConfig
from paving.circuit_run.fitting import Deferred, Fitting, points_of, recipe_key
from paving.circuit_run.folder import load_circuit, read_circuit_config
from paving.circuit_run.inputs import held_out_sets, run_pairs, set_name
from paving.circuit_run.rows import COMPARATORS, comparator
from paving.circuit_run.stages import judged_by, read_strengths
from paving.evaluation.judges import Judge
from paving.evaluation.refusal_policy import (
    BENIGN,
    CATEGORY,
    FrontierPoint,
    LayerSummary,
    PolicyMetrics,
    PolicyRow,
    PromptSet,
    policy_row,
)
from paving.evaluation.statistics import wilson
from paving.evaluation.three_way import Protocol, RowSpec
from paving.evaluation.utility import read_utility
from paving.intervention import Identity, Intervention
from paving.report import write_circuit_report
from paving.run import Means
from paving.run_folder import RunError, write_text
from paving.run_records import examples_of
from paving.traces.store import TraceStore
from paving.training.strength import StrengthPoint, choose_strength

EDIT = "c-delta-theta"


def evaluate(
    folder: Path,
    means: Means,
    *,
    held_out: str | None = None,
    against: Sequence[str] = (),
    ood: Sequence[str] = (),
    ood_benign: Sequence[str] = (),
    deltas: Sequence[Path] = (),
    judge: Judge | None = None,
) -> PolicyMetrics:
    """Base, the edit at its α, and every row of `against` at the strength that the same rule chooses for it.

    held_out further pairs, for a run that was begun without: they play no part in circuit, Δθ or α
    against  rows of paving.circuit_run.rows: inverse, random, as, cast, ws
    ood      prompt files or datasets that the circuit was not found on; what they should do is not judged, only what changed
    ood_benign  the same of prompts that are not to be refused: other kinds than the benign pairs that were trained on
    deltas   folders of further deltas of this base, each a row at its own α: compositions, whose figures are written into
             them for the card, or other categories'
    Rows and sources of an earlier evaluation stay.

    raises   RunError without a finished delta or held-out pairs, or for a further delta of another base
    """
    config = read_circuit_config(folder)
    train, calibration = run_pairs(config, folder)
    names, sources, benign_sources = with_earlier(folder, against, ood, ood_benign)
    others = [comparator(name) for name in names]  # an unknown row is refused before minutes are spent
    further = further_deltas(folder, deltas, means)
    asked = with_held_out(config, folder, held_out)
    sets, left_out = held_out_sets(asked, sources, benign_sources)
    if not (folder / "delta").exists():
        raise RunError(f"{folder} has no finished delta. Train it first: paving circuit edit {folder}")
    delta = load_delta(folder / "delta")
    backbone = means.load(config.model, config.dtype)
    load_circuit(folder, backbone.fingerprint)  # the files behind a model's name may have changed since
    by, curve = read_strengths(folder / "strengths.json")
    if by != judged_by(config, judge):
        raise RunError(
            f"α of {folder} was chosen by the judge {by}; by {judged_by(config, judge)} the other rows' strengths would "
            f"be chosen on other grounds. Evaluate with {by}."
        )
    if delta.description.base.fingerprint != backbone.fingerprint:
        raise RunError(f"{folder / 'delta'} was not made on {config.model} as it is now. Put back the run's own delta.")
    for name, (path, other) in further.items():
        if other.description.base.fingerprint != backbone.fingerprint:
            raise RunError(f"{path} ({name}) was not made on {config.model} as it is now. Leave it out.")
    if left_out:
        means.say(f"left out: {left_out} held-out prompts that stand among the run's own pairs")
    protocol = Protocol(config.decoding, judge or means.judge(config.judge))
    measure = _Rows(backbone, sets, protocol, folder, means)
    rows = [measure.row(Identity(), "reference", None, "base")]
    rows.append(measure.row(delta.edit(), "edit", delta.alpha, f"{weights_sha256(delta)}/{delta.alpha}"))
    by_limit = choose_strength(curve, config.strength.limit)
    frontier = {EDIT: frontier_points(curve, delta.alpha)}
    for name, (path, other) in further.items():
        # By what it comes to: compositions of the same deltas by other rules and scales have the same tensors.
        key = TraceStore.key(edited=[line.edited_sha256 for line in other.description.layers])
        row = measure.row(replace(other.edit(), name=name), "delta", other.alpha, key)
        rows.append(row)
        if other.description.composition is not None:  # a single category's are those of its own run
            found = {**other.description.metrics, **card_metrics(row, composed=True)}
            save_delta(with_metrics(other, found), path, overwrite=True)
    for other in others:
        fitting = Fitting(other, backbone, config, train, folder, means)
        points = points_of(fitting, calibration, judge, curve[0])
        best = choose_strength(points, config.strength.limit)
        frontier[other.name] = frontier_points(points, best and best.strength)
        if best is not None:
            edit, key = Deferred(other.name, best.strength, fitting), recipe_key(config, other.name, best.strength)
            rows.append(measure.row(edit, "comparator", best.strength, key))
    metrics = PolicyMetrics(
        run=folder.name,
        model=config.model,
        category=config.category,
        seed=config.seed,
        judge=protocol.judge.name,
        decoding=config.decoding.model_dump(),
        pairs={"train": len(train), "calibration": len(calibration), "held_out": len(sets[0].prompts)},
        held_out=None if asked is config else asked.held_out,
        ood=sources,
        ood_benign=benign_sources,
        deltas={name: os.path.relpath(path, folder.resolve()) for name, (path, _) in further.items()},
        left_out=left_out,
        over_refusal_limit=config.strength.limit,
        owners_alpha=by_limit is None or by_limit.strength != delta.alpha,
        touched=touched(backbone, delta),
        layers=layer_summaries(folder, delta),
        frontier=frontier,
        rows=rows,
    )
    write_text(folder / "metrics.json", metrics.model_dump_json(indent=1))
    save_delta(with_metrics(delta, card_metrics(rows[1])), folder / "delta", overwrite=True)
    report(folder)
    return metrics


def report(folder: Path) -> Path:
    """(Re)write report.html from what the run folder holds. No model is loaded."""
    path = folder / "metrics.json"
    if not path.exists():
        raise RunError(f"{folder} has no metrics.json yet. Evaluate it first: paving circuit evaluate {folder}")
    try:
        metrics = PolicyMetrics.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(
            f"{path} is damaged or of another version. Evaluate again: paving circuit evaluate {folder}"
        ) from error
    names = [row.name for row in metrics.rows]
    examples = []
    for name in metrics.rows[0].sets:
        answers = folder / "sets" / name
        examples += [replace(e, bucket=name) for e in examples_of(answers, answers / "verdicts", names, per_bucket=3)]
    measured = read_utility(folder / "utility.json")
    return write_circuit_report(metrics, folder / "report.html", examples=examples, utility=measured)


def card_metrics(row: PolicyRow, *, composed: bool = False) -> dict[str, dict]:
    """What the model card says of the edit, each with its n and interval.

    composed: no category of it is the one. Then only the run's own category and benign prompts are told: its prompts of
              other categories are fewer, and held out from this run's pairs alone
    """
    names = {BENIGN: "benign_over_refusal"} | ({} if composed else {CATEGORY: "harmful_refusal"})
    told = {name: s for name, s in row.sets.items() if s.side in (CATEGORY, BENIGN) or not composed}
    found = {names.get(s.side, f"refusal_of_{name}"): s.refused.model_dump() for name, s in told.items()}
    broken = {f"{name}_broken": s.broken.model_dump() for name, s in row.sets.items() if s.side in (CATEGORY, BENIGN)}
    return found | broken


def with_held_out(config: CircuitConfig, folder: Path, held_out: str | None) -> CircuitConfig:
    """The configuration with the held-out pairs that were asked for now or, where it names none, in an earlier evaluation.

    raises RunError where the run names others
    """
    if config.held_out is not None:
        if held_out not in (None, config.held_out):
            raise RunError(
                f"{folder} was begun with the held-out pairs {config.held_out}; its rows are of them. Leave --held-out out, "
                "or begin another run with yours."
            )
        return config
    with suppress(FileNotFoundError, ValueError):
        earlier = PolicyMetrics.model_validate_json((folder / "metrics.json").read_text(encoding="utf-8")).held_out
        held_out = held_out or earlier
    return config if held_out is None else config.model_copy(update={"held_out": held_out})


def with_earlier(
    folder: Path, against: Sequence[str], ood: Sequence[str], ood_benign: Sequence[str]
) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """(comparators, name -> source of other prompts, the same of benign ones) with those of an earlier evaluation: asking
    for one more must not take away another. A metrics.json that cannot be read adds none: evaluating again mends it."""
    names, sources, benign_sources = [], {}, {}
    with suppress(FileNotFoundError, ValueError):  # absent; damaged, or of another version
        earlier = PolicyMetrics.model_validate_json((folder / "metrics.json").read_text(encoding="utf-8"))
        names = [name for name in earlier.frontier if name != EDIT]
        sources, benign_sources = dict(earlier.ood), dict(earlier.ood_benign)
    for asked, known, ending in ((ood, sources, ""), (ood_benign, benign_sources, "-benign")):  # both halves of one file
        for source in asked:
            name = set_name(source) + ending
            if known.setdefault(name, source) != source:
                raise RunError(
                    f"two sources of prompts are called {name!r}: {known[name]} and {source}. Rename one; where the first "
                    f"is of an earlier evaluation, moving {folder / 'metrics.json'} away leaves it out."
                )
    return list(dict.fromkeys([*names, *against])), sources, benign_sources


def further_deltas(folder: Path, deltas: Sequence[Path], means: Means) -> dict[str, tuple[Path, Delta]]:
    """Row -> (folder, delta) of those asked for and of an earlier evaluation's that are still there. A row is called as
    the delta's folder, or as the run that the folder `delta` is of.

    raises RunError for two of one name, or one that is called as another row
    """
    earlier: dict[str, str] = {}
    with suppress(FileNotFoundError, ValueError):
        earlier = PolicyMetrics.model_validate_json((folder / "metrics.json").read_text(encoding="utf-8")).deltas
    paths = {}
    for name, kept in earlier.items():
        path = (folder.resolve() / kept).resolve()
        if path.exists():
            paths[name] = path
        else:
            means.say(f"left out: the row {name}, whose delta {path} is gone")
    for path in (d.resolve() for d in deltas):
        name = path.parent.name if path.name == "delta" else path.name
        if name in ("base", EDIT, *(c.name for c in COMPARATORS)) or paths.setdefault(name, path) != path:
            raise RunError(f"another row is called {name}, as {path} would be. Rename its folder.")
    return {name: (path, load_delta(path)) for name, path in paths.items()}


class _Rows:
    """Measures rows one after the other, each paired with the base, which comes first."""

    def __init__(self, backbone: Backbone, sets: Sequence[PromptSet], protocol: Protocol, folder: Path, means: Means):
        self.backbone, self.sets, self.protocol, self.means = backbone, sets, protocol, means
        self.folder, self.base = folder / "sets", None

    def row(self, intervention: Intervention, kind: str, strength: float | None, key: str):
        spec = RowSpec(intervention, kind, "none", strength, key)
        row, labels = policy_row(
            self.backbone, spec, self.sets, self.protocol, self.folder, self.means.stage, base=self.base
        )
        self.base = self.base or labels
        return row


def frontier_points(points: Sequence[StrengthPoint], chosen: float | None) -> list[FrontierPoint]:
    return [
        FrontierPoint(
            strength=p.strength,
            category_refused=wilson(p.harmful_refused, p.n_harmful),
            benign_refused=wilson(p.benign_refused, p.n_benign),
            benign_broken=wilson(p.benign_broken, p.n_benign),
            chosen=p.strength == chosen,
        )
        for p in points
    ]


def touched(backbone: Backbone, delta: Delta) -> float:
    """Share of the model's parameters that the circuit holds."""
    held = sum(values.numel() for values in delta.slices.values.values())
    return held / sum(p.numel() for p in backbone.model.parameters())


def layer_summaries(folder: Path, delta: Delta) -> list[LayerSummary]:
    mask, scores = load_circuit(folder)
    summaries = []
    for layer, s in sorted(scores.items()):
        chosen = mask.channels.get(layer, ())
        values = delta.slices.values.get(layer)
        summaries.append(
            LayerSummary(
                layer=layer,
                mean_score=float(s.mean()),
                chosen_score=float(s[list(chosen)].mean()) if chosen else None,
                chosen=len(chosen),
                delta_norm=None if values is None else float((values.double() * delta.alpha).norm()),
            )
        )
    return summaries
