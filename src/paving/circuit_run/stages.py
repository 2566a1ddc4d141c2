"""A circuit run, top to bottom: find the circuit of a category, edit its weights, choose α."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from paving.backbone import Backbone
from paving.backbone.projections import ffn_outputs
from paving.circuit import edges
from paving.circuit.attribution import attribute
from paving.circuit.base_files import why_not_exported
from paving.circuit.delta import Delta, check_alpha, make_delta
from paving.circuit.delta_files import load_delta, save_delta
from paving.circuit.description import public_name
from paving.circuit.edges.graph import taken_apart
from paving.circuit.mask import Mask, check_told_apart, choose
from paving.circuit.objective import Objective, objective, references
from paving.circuit.pairs import Pair
from paving.circuit.slices import CircuitEdit, SliceDelta, check_off_circuit, off_circuit
from paving.circuit.token_pairs import pair_batches, token_pairs
from paving.circuit_run.config import CircuitConfig
from paving.circuit_run.folder import load_circuit, open_circuit_run, read_circuit_config, save_circuit
from paving.circuit_run.inputs import (
    also_benign,
    benign_prompts,
    harmful_prompts,
    held_out_sets,
    openings_of,
    pairs_of,
    record_split,
    run_pairs,
    split_record,
)
from paving.circuit_run.trained import edge_layers, trained_slices, within
from paving.evaluation.judges import Judge
from paving.evaluation.judges.named import judge_line
from paving.generation import Decoding
from paving.intervention import Intervention
from paving.run import Means
from paving.run_folder import RunError, write_json
from paving.run_labels import labels_of
from paving.training.strength import Keep, StrengthPoint, choose_strength, prompts_needed, sweep


class NoStrengthError(RunError):
    """No strength that was tried keeps to the limit: a result of a run, and not a fault of it."""


def find(config: CircuitConfig, folder: Path, means: Means) -> Mask:
    """EAP-IG over the training pairs -> the circuit, in circuit.json; taken from there if it is."""
    train, calibration = pairs_of(config)  # a bad file is refused before a model is loaded or a folder made
    also = also_benign(config)[1]
    if not (folder / "circuit.json").exists():
        check_enough(len(calibration) + len(also), config.strength.limit)
    phrases = openings_of(config)
    if config.held_out is not None:
        held_out_sets(config, {})  # not after hours of training
    backbone = means.load(config.model, config.dtype)
    read = train[: config.attributed]
    if not (folder / "config.json").exists():
        check_base(backbone, config, read, means)  # before there is a folder that belongs to a configuration that fails
    open_circuit_run(config, folder)
    record_split(config, folder, means)
    if (folder / "circuit.json").exists():
        means.say(f"the circuit in {folder} is found; nothing to do")
        return load_circuit(folder, backbone.fingerprint)[0]
    j = objective(references(backbone, read, phrases, kind=config.reference, seed=config.seed))
    scores = attribute(backbone, read, j, config.attribution, means.stage("attribution (pairs)", len(read)))
    check_told_apart(scores, config.scope)
    find_edges(backbone, config, read, j, folder, means)
    mask = choose(
        within(scores, edge_layers(config, folder)), config.attribution.reading, config.fraction, scope=config.scope
    )
    save_circuit(folder, mask, scores, backbone.fingerprint)
    return mask


def edit(folder: Path, means: Means, *, alpha: float | None = None, judge: Judge | None = None) -> Delta:
    """θ+ and θ− on the circuit, Δθ, and α chosen on the calibration split; the delta is saved in `folder`/delta.

    alpha: the owner's own choice, in place of the one the limit would make
    raises NoStrengthError if no α keeps to the limit; Δθ and the curve are kept, and --alpha takes one of them.
    CircuitError if a weight outside the circuit is not bit for bit the base's, after training and at the chosen α
    """
    config = read_circuit_config(folder)
    if alpha is not None:
        check_alpha(alpha)
    backbone = means.load(config.model, config.dtype)
    mask, scores = load_circuit(folder, backbone.fingerprint)
    if (folder / "delta").exists():
        found = load_delta(folder / "delta")
        if alpha not in (None, found.alpha):
            raise RunError(
                f"{folder / 'delta'} has α {found.alpha:g} already. Move it away to choose another; nothing changed."
            )
        means.say(f"the delta in {folder} is finished; nothing to do")
        return found
    splits = train, calibration = run_pairs(config, folder)
    before = off_circuit(backbone, mask)
    slices = trained_slices(folder / "slices.safetensors", backbone, config, train, mask, folder, means)
    points = calibrated(backbone, config, calibration, slices, folder, means, judge)
    if alpha is None:
        chosen = choose_strength(points, config.strength.limit)
    else:
        chosen = next((p for p in points if p.strength == alpha), None)
    if alpha is None and chosen is None:
        raise NoStrengthError(
            f"no α of {', '.join(f'{a:g}' for a in config.strength.alphas)} keeps benign over-refusal within "
            f"{config.strength.limit:.1%} of {points[0].n_benign} calibration prompts, as (refused + 1) / (n + 1), with no "
            f"more answers broken beyond the base's ({_curve(points)}). "
            f"Take one all the same with --alpha, or another recipe in another folder. Δθ and the curve are kept."
        )
    delta = make_delta(
        backbone,
        slices,
        category=config.category,
        alpha=chosen.strength if alpha is None else alpha,
        scores=scores,
        recipe=calibration_point(chosen) | made_by(config, splits, judged_by(config, judge)),
    )
    with delta.edit().written(backbone):
        check_off_circuit(backbone, mask, before)
    save_delta(delta, folder / "delta")
    return delta


def check_enough(calibration: int, limit: float) -> None:
    """raises RunError where no result on so few pairs could show that over-refusal keeps to the limit"""
    needed = prompts_needed(limit)
    if needed is None or calibration < needed:
        enough = "no number of them can" if needed is None else f"at least {needed} can"
        raise RunError(
            f"{calibration} calibration pairs cannot show over-refusal of at most {limit:.1%}; {enough}. Set aside more "
            "(calibration in --config), or allow more (strength.limit there): at 1.0 any α does, and --alpha chooses."
        )


def check_base(backbone: Backbone, config: CircuitConfig, read: Sequence[Pair], means: Means) -> None:
    """raises CircuitError or BackboneError for what this configuration cannot do with this model, before anything is
    measured; says where its edit could not be exported."""
    choose(nothing_scored(backbone, config), config.attribution.reading, config.fraction, scope=config.scope)
    for _ in pair_batches(backbone, token_pairs(backbone, read), config.attribution.batch_size):
        pass  # each prompt fits the context
    if config.edges is not None:
        taken_apart(backbone)
    hindrance = why_not_exported(backbone)
    if hindrance is not None:
        means.say(f"an edit of this base stays in memory, it cannot be written into a checkpoint: {hindrance}")


# --- the stages -------------------------------------------------------------------------------------------------


def find_edges(
    backbone: Backbone, config: CircuitConfig, train: Sequence[Pair], j: Objective, folder: Path, means: Means
) -> None:
    """The edge-level circuit, in edges.json, where the configuration asks for one."""
    if config.edges is None:
        return
    pairs = edges.token_pairs(backbone, train[: config.edge_pairs])
    done = means.stage("edge-level attribution (pairs)", len(pairs))
    scores = edges.edge_scores(backbone, pairs, j, steps=config.attribution.steps, progress=lambda _so_far: done(1))
    edges.greedy_edges(scores, config.edges).save(folder / "edges.json")


def nothing_scored(backbone: Backbone, config: CircuitConfig) -> dict[int, Tensor]:
    """Scores of the shape that attribution will give: what a fraction that chooses nothing is refused on, before it."""
    neurons = config.attribution.reading == "neurons"
    shapes = {layer: p.weight.shape for layer, p in ffn_outputs(backbone).items() if layer >= config.attribution.first}
    return {layer: torch.zeros(shape[1] if neurons else shape[0]) for layer, shape in shapes.items()}


def calibrated(
    backbone: Backbone,
    config: CircuitConfig,
    calibration: Sequence[Pair],
    slices: SliceDelta,
    folder: Path,
    means: Means,
    judge: Judge | None,
) -> tuple[StrengthPoint, ...]:
    """Refusal of the category against over-refusal at every α, in strengths.json; taken from there if it is."""

    def measure(known: Sequence[StrengthPoint], keep: Keep) -> Sequence[StrengthPoint]:
        at, alphas = (lambda a: CircuitEdit(slices, a)), config.strength.alphas
        return strengths_of(backbone, config, calibration, at, alphas, means, judge, known, keep)

    return kept_strengths(folder / "strengths.json", judged_by(config, judge), measure)


def judged_by(config: CircuitConfig, judge: Judge | None) -> str:
    return config.judge if judge is None else judge.name


def kept_strengths(
    path: Path, judge: str, measure: Callable[[Sequence[StrengthPoint], Keep], Sequence[StrengthPoint]]
) -> tuple[StrengthPoint, ...]:
    """The points in `path`; measured, and written there, where there are none or another judge counted them.

    measure: (points of a sweep that was stopped, what to call with all points so far) -> points
    """
    if path.exists():
        by, points = read_strengths(path)
        if by == judge:
            return points
    partial, known = path.with_suffix(".partial.json"), ()
    if partial.exists():
        by, found = read_strengths(partial)
        known = found if by == judge else ()

    def write(to: Path, points: Sequence[StrengthPoint]) -> None:
        to.parent.mkdir(parents=True, exist_ok=True)
        write_json(to, {"judge": judge, "points": [asdict(p) for p in points]})

    points = tuple(measure(known, lambda so_far: write(partial, so_far)))
    write(path, points)
    partial.unlink(missing_ok=True)
    return points


def read_strengths(path: Path) -> tuple[str, tuple[StrengthPoint, ...]]:
    """(judge, points). raises RunError for a file that cannot be read"""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found["judge"], tuple(StrengthPoint(**p) for p in found["points"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(
            f"{path} is missing or damaged. Move it away, and for strengths.json the delta beside it: the "
            "command that wrote them makes them again."
        ) from error


def strengths_of(
    backbone: Backbone,
    config: CircuitConfig,
    calibration: Sequence[Pair],
    at: Callable[[float], Intervention],
    strengths: Sequence[float],
    means: Means,
    judge: Judge | None = None,
    known: Sequence[StrengthPoint] = (),
    keep: Keep | None = None,
) -> tuple[StrengthPoint, ...]:
    """The same rule for every method: refusal and over-refusal on the calibration pairs, strength by strength."""
    labels = labels_of(judge or means.judge(config.judge))
    shorter = config.strength.max_new_tokens
    decoding = config.decoding if shorter is None else Decoding(max_new_tokens=shorter)
    harmful, benign = harmful_prompts(calibration), [*benign_prompts(calibration), *also_benign(config)[1]]
    return sweep(
        backbone, harmful, benign, at, strengths, labels, decoding,
        enough=config.strength.enough, known=known, keep=keep, stage=means.stage,
    )  # fmt: skip


def calibration_point(chosen: StrengthPoint | None) -> dict[str, object]:
    return {"calibration": asdict(chosen)} if chosen else {}


def made_by(config: CircuitConfig, splits: tuple[Sequence[Pair], Sequence[Pair]], judge: str) -> dict[str, object]:
    """What a delta says of how it was made: enough to make it again, and no path of this machine. judge: who chose α"""
    settings = config.model_dump(mode="json", exclude={"model", "category", "weight_steering"})
    settings["judge"] = public_judge(judge)
    named = {
        key: Path(settings[key]).name if Path(settings[key]).exists() else settings[key]
        for key in ("pairs", "held_out", "also_benign", "openings")
        if settings[key] is not None
    }
    digests = {
        "pairs_sha256": sha256(json.dumps(split_record(splits, also_benign(config))).encode()).hexdigest(),
        "openings_sha256": sha256(json.dumps(asdict(openings_of(config))).encode()).hexdigest(),
    }
    settings["calibration_pairs"] = settings.pop("calibration")  # `calibration` is what they showed at the chosen α
    return settings | named | digests


def public_judge(judge: str) -> str:
    """A judge's line or name, without folders and addresses."""
    try:
        line = judge_line(judge)
    except ValueError:  # the name of a judge that was given as an object
        return judge
    return f"{line.kind}={public_name(line.model)}" if line.model else str(line)


def _curve(points: Sequence[StrengthPoint]) -> str:
    return "; ".join(f"α {p.strength:g}: harmful {p.harmful_refusal:.0%}, benign {p.over_refusal:.0%}" for p in points)
