"""Which ablation of table 19 a run is, told from nothing but its configuration beside the full recipe's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paving.run_folder import RunConfig

# The names under which `paving.ablations` makes them.
NO_CONTRASTIVE = "no-contrastive"
NO_TRAJECTORY = "no-trajectory"
NO_STAGE_3 = "no-stage-3"
SHORT_HORIZON = "short-horizon"
LATE_EDIT = "late-edits"
LATE_ROUTER = "late-router"
EARLY_ROUTER = "early-router"
SINGLE_EXPERT = "single-expert"
LOW_RANK = "low-rank"
TWO_OBJECTIVES = "two-objectives"
FIXED_EXPERT = "fixed-expert"  # expert 0; any other one is no ablation of the paper's

Leaves = Mapping[str, Any]  # dotted name -> value as in config.json

SOURCES = ("model", "edit", "benign", "harmful", "targets_from")
SEEDS = ("split_seed", "training.seed")
ROUTE, EDIT = "controller.route_layers", "controller.edit_layers"
ROUTER = {ROUTE, EDIT, "controller.pooling"}  # what may change with the blocks that the router reads
PAPERS_LAST_ROUTE = 4
SCALES, POLICIES = "calibration.scales", "calibration.policies"
ACTIVATION = "controller.activation"
EXPERTS = {"controller.n_experts", "controller.centres", "controller.widths"}  # windows follow from the number of experts
# A field that configurations written before it existed do not have, and what they meant.
ABSENT = {"training.mixture": "router", "controller.activation": "gelu", "objectives": "three"}


def variant_of(config: RunConfig, reference: RunConfig) -> str | None:
    """The ablation's name; None for the reference itself, with any seed; else the differing fields in plain words.

    Only the ablated block may differ: a run without contrastive warm-up *and* with other prompts is no ablation.
    """
    ours, full = leaves(config), leaves(reference)
    if not (differing := differences(ours, full)):
        return None
    return named_variant(ours, full) or f"differs in {', '.join(sorted(differing))}"


def known_variant(config: RunConfig, reference: RunConfig) -> str | None:
    """The ablation's name; None for a configuration that is none."""
    return named_variant(leaves(config), leaves(reference))


def named_variant(ours: Leaves, full: Leaves) -> str | None:
    """The ablation's name, from the fields alone."""
    differing = differences(ours, full) - _given_point(ours, full)
    if differing <= ROUTER and ROUTE in differing:
        # A later router may move the first edited block with it, as the paper's does (router 8-11, edit 12-33).
        return _router(ours[ROUTE])
    if differing <= EXPERTS and ours["controller.n_experts"] == 1 != full["controller.n_experts"]:
        return SINGLE_EXPERT
    if differing <= {*EXPERTS, ACTIVATION} and ours[ACTIVATION] == "none" and ours["controller.n_experts"] == 1:
        return LOW_RANK
    if len(differing) != 1:
        return None
    (name,) = differing
    value, usual = ours[name], full[name]
    match name:
        case "training.contrastive_epochs" if value == 0:
            return NO_CONTRASTIVE
        case "training.weights.trajectory" if value == 0:
            return NO_TRAJECTORY
        case "training.stage_epochs" if value[:2] == usual[:2] and value[2] == 0:
            return NO_STAGE_3
        case "training.horizon" if value < usual:
            return SHORT_HORIZON
        case "objectives" if value == "two":
            return TWO_OBJECTIVES
        case "training.mixture" if value == "expert:0":
            return FIXED_EXPERT
        case "controller.edit_layers" if _edits_later(value, usual, full[ROUTE]):
            return LATE_EDIT
    return None


def _given_point(ours: Leaves, full: Leaves) -> set[str]:
    """Scale and policy, where this run was given one of those that the full recipe chose among: rows of table 19 share
    the full recipe's operating point, so that is no second change."""
    given = len(ours[SCALES]) == len(ours[POLICIES]) == 1
    allowed = ours[SCALES][0] in full[SCALES] and ours[POLICIES][0] in full[POLICIES]
    return {SCALES, POLICIES} if given and allowed else set()


def differences(ours: Leaves, full: Leaves) -> set[str]:
    """Dotted names of the fields that differ; both without seeds, as `leaves` gives them."""
    return {name for name in {*ours, *full} if ours.get(name) != full.get(name)}


def leaves(config: RunConfig) -> dict[str, Any]:
    """Dotted name -> value as in config.json, seeds left out; files by their names, and missing fields filled in."""
    found = {**ABSENT, **_leaves(config.model_dump(mode="json"))}
    # One file may be written as a relative path in one configuration and as an absolute one in the other.
    found |= {name: short_name(found[name]) for name in SOURCES if found[name] is not None}
    return {name: value for name, value in found.items() if name not in SEEDS}


def short_name(source: str) -> str:
    """A model or prompt file by its own name; dataset and model ids stay whole."""
    path, mark, query = source.partition("?")
    local = path.startswith(("/", "~", ".")) or ":\\" in path or path.lower().endswith((".jsonl", ".csv"))
    return (Path(path.replace("\\", "/")).name if local else path) + mark + query


def _leaves(values: Leaves, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _edits_later(ours: Sequence[int] | None, full: Sequence[int] | None, route: Sequence[int]) -> bool:
    """Fewer blocks, and none of the first; `full` None stands for every block after the router's."""
    if ours is None:
        return False
    first = max(route) + 1 if full is None else min(full)
    return min(ours) > first and (full is None or set(ours) <= set(full))


def _router(ours: Sequence[int]) -> str | None:
    """Early or late beside the paper's own window, blocks 1-4, and not beside the full recipe's: that may be late itself."""
    if max(ours) <= PAPERS_LAST_ROUTE:
        return EARLY_ROUTER
    return LATE_ROUTER if min(ours) > PAPERS_LAST_ROUTE else None
