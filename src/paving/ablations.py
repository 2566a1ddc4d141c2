"""The design ablations of Residual Paving, tables 2 and 19, the capacity controls of table 14 and the two-objective fit of
table 9: each is the full recipe with one block of it changed.

Ablations that need a training of their own are configurations, below. The gate-policy and expert-policy blocks are
further rows of the full recipe's own run: `ROW_POLICIES` and `ROW_MIXTURES`, for `paving eval`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from paving.controller.config import windows
from paving.controller.store import read_description
from paving.evaluation.results import Metrics
from paving.run import Means, evaluate, train
from paving.run_folder import RunConfig, RunError, read_config

ROW_POLICIES = ("soft+veto", "hard+veto", "thresholded+veto")
ROW_MIXTURES = ("uniform", "expert:0", "expert:1", "expert:2")


@dataclass(frozen=True)
class Ablation:
    """One trained variant.

    block   the paper's name of the block of rows it stands in
    change  (the full recipe's configuration, number of layers of the backbone) -> the variant's
    """

    name: str
    block: str
    change: Callable[[RunConfig, int], RunConfig]


def ablation(name: str) -> Ablation:
    """raises ValueError naming what is allowed."""
    found = next((a for a in ABLATIONS if a.name == name), None)
    if found is None:
        raise ValueError(f"the ablation {name!r} is not known; allowed: {', '.join(a.name for a in ABLATIONS)}.")
    return found


def run_ablation(full: Path, name: str, folder: Path, means: Means) -> Metrics:
    """Train and evaluate one variant of a finished run, at the scale that the run chose; goes on where it was killed.

    The base's answers are taken from the full recipe's run where they are the same.

    raises RunError for a run that was not trained or evaluated, ValueError for an ablation that is not known
    """
    train(variant_of(full, name), folder, means)
    (folder / "completions").mkdir(exist_ok=True)
    for file in ("base.jsonl", "base.key"):  # the key still decides whether they are taken
        if not (folder / "completions" / file).exists():
            shutil.copy(full / "completions" / file, folder / "completions" / file)
    return evaluate(folder, means)


def variant_of(full: Path, name: str) -> RunConfig:
    """The configuration of one variant of a finished run. raises as `run_ablation` does"""
    variant, config = ablation(name), read_config(full)
    if not (full / "metrics.json").exists():
        raise RunError(f"{full} has no metrics.json yet. Evaluate it first: paving eval {full}")
    if config.router is not None:
        raise RunError(f"{full} has a searched gate and no training of its own. Ablate the run that its experts are from.")
    trained = read_description(full / "controller")
    changed = at_scale(variant.change(config, trained["base"]["n_layers"]), trained["scale"])
    try:
        return RunConfig.model_validate(changed.model_dump())
    except ValidationError as error:
        raise RunError(f"{name} cannot be made of {full}: {error.errors()[0]['msg']}") from error


def at_scale(config: RunConfig, scale: float) -> RunConfig:
    """The same with the scale and the gate policy given instead of chosen, as all rows of the paper's tables share them."""
    return _calibration(config, scales=(scale,), policies=("thresholded",))


def _without_contrastive(config: RunConfig, n_layers: int) -> RunConfig:
    return _training(config, contrastive_epochs=0)


def _without_trajectory(config: RunConfig, n_layers: int) -> RunConfig:
    return _training(config, weights=config.training.weights.model_copy(update={"trajectory": 0.0}))


def _without_stage_3(config: RunConfig, n_layers: int) -> RunConfig:
    first, second, _ = config.training.stage_epochs
    return _training(config, stage_epochs=(first, second, 0))


def _short_horizon(config: RunConfig, n_layers: int) -> RunConfig:
    return _training(config, horizon=max(2, config.training.horizon // 2))  # the paper: 6 instead of 12


def _fixed_expert(config: RunConfig, n_layers: int) -> RunConfig:
    return _training(config, mixture="expert:0")


def _single_expert(config: RunConfig, n_layers: int) -> RunConfig:
    centres, widths = windows(1)
    return _controller(config, n_experts=1, centres=centres, widths=widths)


def _low_rank(config: RunConfig, n_layers: int) -> RunConfig:
    """One linear map of low rank a layer: the least that is not a constant vector."""
    return _controller(_single_expert(config, n_layers), activation="none")


def _two_objectives(config: RunConfig, n_layers: int) -> RunConfig:
    """Edit prompts and benign keeps alone: what the harmful keeps do for the router, the experts and the veto."""
    return config.model_copy(update={"objectives": "two"})


def _late_edits(config: RunConfig, n_layers: int) -> RunConfig:
    return _controller(config, edit_layers=_layers(16, n_layers))


def _late_router(config: RunConfig, n_layers: int) -> RunConfig:
    route = tuple(dict.fromkeys(_depth(layer, n_layers) for layer in (8, 9, 10, 11)))
    return _controller(config, route_layers=route, edit_layers=_layers(12, n_layers))


def _early_router(config: RunConfig, n_layers: int) -> RunConfig:
    """The paper's own route layers, for recipes that read later."""
    return _controller(config, route_layers=(1, 2, 3, 4), edit_layers=tuple(range(5, n_layers)))


ABLATIONS = (
    Ablation("no-contrastive", "training objective", _without_contrastive),
    Ablation("no-trajectory", "training objective", _without_trajectory),
    Ablation("no-stage-3", "training objective", _without_stage_3),
    Ablation("short-horizon", "architecture/horizon", _short_horizon),
    Ablation("late-edits", "architecture/horizon", _late_edits),
    Ablation("late-router", "architecture/horizon", _late_router),
    Ablation("early-router", "architecture/horizon", _early_router),
    Ablation("single-expert", "expert policy", _single_expert),
    Ablation("fixed-expert", "expert policy", _fixed_expert),
    Ablation("low-rank", "capacity control", _low_rank),
    Ablation("two-objectives", "objectives", _two_objectives),
)

PAPER_LAYERS = 34  # of Gemma-3-4B-IT, whose layer numbers the paper gives


def _depth(layer: int, n_layers: int) -> int:
    """The layer at the same relative depth in a backbone of another depth."""
    return round(layer * (n_layers - 1) / (PAPER_LAYERS - 1))


def _layers(first: int, n_layers: int) -> tuple[int, ...]:
    return tuple(range(_depth(first, n_layers), n_layers))


def _training(config: RunConfig, **changes: object) -> RunConfig:
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def _controller(config: RunConfig, **changes: object) -> RunConfig:
    return config.model_copy(update={"controller": config.controller.model_copy(update=changes)})


def _calibration(config: RunConfig, **changes: object) -> RunConfig:
    return config.model_copy(update={"calibration": config.calibration.model_copy(update=changes)})
