"""Another gate for a finished run's controller, chosen out of fold: a run folder of its own, with the same experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import torch

from paving.backbone import Backbone, ChatTemplateError, checked_ids
from paving.controller.conformal import reference_of
from paving.controller.gates import Hard
from paving.controller.regated import standardised, with_gate
from paving.controller.residual_paving import ResidualPaving
from paving.controller.store import load_controller, read_description, save_controller
from paving.prompts import CONTRAST_SETS, PromptError, contrast_prompts, read_contrasts
from paving.prompts.clothes import WARDROBE, dressed
from paving.prompts.contrasts import groups_near, pair_of
from paving.prompts.types import Prompt, SplitName, count_by_bucket
from paving.run import Means
from paving.run_folder import STARTER, RunConfig, RunError, check_run, open_run, read_config, write_json
from paving.run_rows import digest
from paving.run_splits import recorded_split
from paving.traces.prompt_states import prompt_states
from paving.training.gate_search import GateSearch, check_groups, default_layers, features, search_gate
from paving.training.prepare import boundary_matrix
from paving.training.promise import Promise, PromiseConfig, check_promises, kept_at, promises, strictest

NONE = "none"
RECORD = "router.json"  # what was tried, what was chosen, and why


def search_router(run: Path, folder: Path, settings: GateSearch, means: Means, promise: PromiseConfig | None = None) -> dict:
    """Search a gate for the controller of `run` and save both in `folder`, ready for `evaluate`; returns the record.

    Of held-out prompts it only looks which contrast pairs repeat them or name their groups. Where a promise is asked for, or
    the run's calibration makes one, its calibration prompts are kept out of the search and raise the threshold afterwards;
    otherwise the search learns from them, too.

    raises PromiseError where calibration is too small for the promise, RunError for a run without a controller or a folder
    of another configuration, PromptError for bad contrast pairs
    """
    before = read_config(run)
    if before.router is not None:
        raise RunError(f"{run} has a searched gate already. Search in the run that its experts are from.")
    if not (run / "controller" / "controller.json").exists():
        raise RunError(f"{run} has no finished controller. Train it first: paving train --out {run} ...")
    if before.objectives == "two":
        raise RunError(
            f"{run} was fitted without harmful keeps, which a gate is searched with. Search in a run of all three."
        )
    # The sets by default may grow: the configuration says which were tried, and a folder of others is not gone on with.
    depth = read_description(run / "controller")["base"]["n_layers"]
    settings = settings.model_copy(update={"layers": settings.layers or default_layers(depth)})
    config = before.model_copy(update={"router": settings})
    if promise is not None:
        calibration = before.calibration.model_copy(update={"promise": promise, "policies": ("hard",)})
        config = config.model_copy(update={"calibration": calibration})
    check_run(config, folder)
    experts = digest(run / "controller" / "controller.safetensors")
    if (folder / "controller" / "controller.json").exists():
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["experts"] != experts:
            raise RunError(f"{folder} holds a gate for other experts than {run} has now. Give another --out folder.")
        means.say(f"the gate in {folder} is chosen; nothing to search")
        return record
    splits = recorded_split(config, run)
    promise = config.calibration.promise
    if promise is not None:
        check_promises(splits.of(SplitName.CALIBRATION), promise)
    learned_from = [*splits.train, *(() if promise is not None else splits.calibration)]
    apart = [*splits.held_out, *(splits.calibration if promise is not None else ())]
    check_groups(learned_from, settings.folds)
    contrasts, dropped = contrast_sets(settings.contrast, apart)
    contrasts = {name: [replace(p, system=config.system) for p in pairs] for name, pairs in contrasts.items()}
    backbone = means.load(config.model, config.dtype)
    for layers in settings.layers or ():
        backbone.check_layers(layers, "route")
    controller = load_controller(run / "controller", backbone)
    kinds, unsaid = sayable(backbone, learned_from[0], settings.clothes)
    copies = dressed(learned_from, settings.clothes, settings.seed, kinds)
    open_run(config, folder)
    worn = [*learned_from, *copies]
    every = [*worn, *{p.id: p for pairs in contrasts.values() for p in pairs}.values()]
    sets = settings.layers
    blocks = [*controller.config.route_layers, *(layer for one in sets for layer in one)]  # the mixture reads on
    tick = means.stage("prompt states", len(every))
    states = prompt_states(backbone, means.store(), every, blocks=blocks, tick=tick)
    n_candidates = len(sets) * len(settings.poolings) * len(settings.kernels) * (1 + len(contrasts))
    tick = means.stage("gates, out of fold", n_candidates + 1)
    found = search_gate(states, learned_from, contrasts, settings, sets, dressed=copies, tick=tick)
    gated = with_gate(controller, found.machines, found.shapes, found.layers, found.pooling)
    read = torch.from_numpy(features(states, worn, gated.config.route_layers, gated.config.pooling))
    gated = standardised(gated, controller.config, read[: len(learned_from)])
    boundary = gated.weights.unlikeness(read).tolist()
    reference = reference_of(found.logits[0].tolist(), worn, boundary=boundary, apart=False)
    gated = replace(gated, reference=reference)
    promised: tuple[Promise, ...] = ()
    if promise is not None:
        calibration = splits.of(SplitName.CALIBRATION)
        calibration = [*calibration, *dressed(calibration, settings.clothes, settings.seed, kinds)]
        gated, promised = keep_promise(backbone, gated, calibration, promise)
    record = {
        "why": found.why(),
        "opened": found.opened,
        "prompts": count_by_bucket(learned_from),
        "tried": [asdict(t) for t in found.tried],
        "pairs": {name: len(pairs) // 2 for name, pairs in contrasts.items()},
        "pairs_dropped": dropped,
        "threshold": gated.policy.threshold,  # above 0 where a promise raised it; `opened` is at 0
        "promises": [p.sentence() for p in promised],
        "experts_of": str(run),
        "experts": experts,
    }
    if copies:
        record["clothes"] = {"copies": len(copies), "kinds": kinds, "unsaid": unsaid, "opened": found.dressed}
    _save(run, folder, config, gated, promised, record)
    return record


def contrast_sets(source: str, apart: Sequence[Prompt]) -> tuple[dict[str, list[Prompt]], int]:
    """The named sets of contrast pairs that candidates may learn from, and how many pairs were dropped.

    A pair is dropped whose focus is a group of the prompts that are kept apart, or names one in its text, or that nearly
    repeats one of them. raises PromptError where none is left
    """
    if source == NONE:
        return {}, 0
    if source == STARTER:
        words, kinds = (contrast_prompts(name) for name in CONTRAST_SETS)
        named: dict[str, Sequence[Prompt]] = {"kinds": kinds, "words+kinds": [*words, *kinds]}
    else:
        named = {f"pairs of {Path(source).name}": read_contrasts(source)}
    groups = {p.group.casefold() for p in apart}
    every = list({p.id: p for pairs in named.values() for p in pairs}.values())
    bad = {pair_of(p) for p, near in groups_near(every, apart).items() if near & groups}
    sets = {name: [p for p in pairs if pair_of(p) not in bad] for name, pairs in named.items()}
    if not any(sets.values()):
        raise PromptError(
            f"all {len(bad)} pairs of {source} stand for words or prompts of the held-out split; give other pairs, or "
            "search with contrast none."
        )
    return sets, len(bad)


def sayable(backbone: Backbone, prompt: Prompt, copies: int) -> tuple[list[str], list[str]]:
    """(kinds of clothes that the model's chat template can say, the others); raises RunError where too few are left"""
    kinds: dict[bool, list[str]] = {True: [], False: []}
    for kind, clothes in WARDROBE.items() if copies else ():
        try:
            checked_ids(backbone, clothes(prompt, Random(0)))
            kinds[True].append(kind)
        except ChatTemplateError:
            kinds[False].append(kind)
    if copies > len(kinds[True]):
        raise RunError(
            f"{copies} copies of a prompt were asked for, each in clothes of another kind, and this model's chat template "
            f"has {len(kinds[True])}: it cannot say {' nor '.join(kinds[False])}. Ask for {len(kinds[True])} or fewer."
        )
    return kinds[True], kinds[False]


def keep_promise(
    backbone: Backbone, controller: ResidualPaving, prompts: Sequence[Prompt], config: PromiseConfig
) -> tuple[ResidualPaving, tuple[Promise, ...]]:
    """The controller with its threshold raised until the promise holds on these calibration prompts. Copies of a prompt in
    other clothes are of its group, and a group counts as one that opens where any of it does."""
    with torch.no_grad():
        z = boundary_matrix(backbone, prompts, controller.config)
        logits, boundary = controller.weights.route(z)[0].tolist(), controller.weights.unlikeness(z).tolist()
    made = promises(logits, prompts, config)
    threshold = max(0.0, strictest(made))
    gated = controller.with_policy(Hard(threshold), name=controller.name)
    gated = replace(gated, reference=reference_of(logits, prompts, boundary=boundary))
    return gated, kept_at(made, threshold, logits, prompts)


def _save(
    run: Path, folder: Path, config: RunConfig, controller: ResidualPaving, promised: Sequence[Promise], record: dict
) -> None:
    calibration = json.loads((run / "calibration.json").read_text(encoding="utf-8"))
    calibration["threshold"] = controller.policy.threshold
    calibration["chosen"]["policy"] = controller.policy.name
    calibration["points_of"] = str(run)  # the scale was chosen there, under the gate of before
    calibration["promises"] = [asdict(p) | {"sentence": p.sentence()} for p in promised]
    write_json(folder / "calibration.json", calibration)
    for name in ("splits.json", "prompts.json"):
        shutil.copy(run / name, folder / name)
    (folder / "completions").mkdir(exist_ok=True)
    for name in ("base.jsonl", "base.key"):  # the base's answers are the same; the key still decides whether they are taken
        if (run / "completions" / name).exists():
            shutil.copy(run / "completions" / name, folder / "completions" / name)
    write_json(folder / RECORD, record)
    trained_on = read_description(run / "controller").get("trained_on", {})
    trained_on = trained_on | {"gate": record["why"], "promises": [p.sentence() for p in promised]}
    if config.system is not None:
        trained_on["system"] = config.system
    save_controller(controller, folder / "controller", {"trained_on": trained_on})
