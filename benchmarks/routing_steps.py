"""What each step towards a better gate is worth on prompts of unseen groups, and whether its promise holds.

    python benchmarks/routing_steps.py same-source [--out .bench] [--seeds 0 1 2] [--json]

Reads finished runs of benchmarks/protocols.py. Every step is a search of its own over what the step allows (see
paving.training.gate_search); held-out prompts are scored once, by what was chosen without them. No answer is decoded: what
an open gate does to the answer is in the runs of `paving router search RUN` and `paving eval`.

Steps learn from training and calibration prompts, but for those that say "training prompts alone", as the learned router
does. AUC intervals, and those of the difference to the learned router, redraw groups with all their prompts in every seed.

The promise: the last step's gate, fitted on training prompts alone; keeps of calibration and held-out split are divided
anew 200 times by group, one part sets the threshold, the other counts. Of all prompts to come it is promised on halves; of
the next ones, as many as the other part has, seven tenths set the threshold. Where no unit may open while a threshold is
set, how often it is exceeded follows from the numbers of groups alone, whatever the gate: `by arithmetic` is that
probability. So the row `held out` stands beside: the threshold of the real calibration split, and what the gate does on the
held-out one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from paving.backbone import Backbone, load_backbone
from paving.controller.gate_machines import GateMachines
from paving.controller.store import load_controller
from paving.evaluation.seeds import pooled_rate
from paving.evaluation.statistics import auc
from paving.prompts.types import Bucket, Prompt, Splits
from paving.router_search import contrast_sets
from paving.run_folder import read_config
from paving.run_records import gate_logits
from paving.run_splits import recorded_split
from paving.traces.prompt_states import PromptStates, prompt_states
from paving.traces.store import TraceStore
from paving.training.gate_search import FoundGate, GateSearch, default_layers, features, search_gate
from paving.training.prepare import boundary_matrix
from paving.training.promise import promise, unit_scores
from protocols import rate

RESPLITS, ALPHA, DELTA, REDRAWS = 200, 0.1, 0.1, 1000
ALONE, LEARNED = "training prompts alone", "learned router"
SIDES = (Bucket.EDIT, Bucket.HARMFUL_KEEP)
PAPER_BLOCKS = (1, 2, 3, 4)
PROMISED = {"of all": 0.5, "of the next": 0.7}  # what is promised -> share of groups that sets the threshold


def steps_of(route_layers: tuple[int, ...], n_layers: int) -> dict[str, GateSearch]:
    """From the third, each allows what the one before does, and one thing more. The first two are the third with less."""
    here = GateSearch(layers=(route_layers,), poolings=("last+mean",), kernels=("linear",), contrast="none")
    machines = here.model_copy(update={"kernels": ("rbf", "linear")})
    layers = machines.model_copy(update={"layers": default_layers(n_layers), "poolings": ("last", "last+mean")})
    return {
        f"linear machines, the run's blocks, {ALONE}": here,
        "linear machines, blocks 1-4": here.model_copy(update={"layers": (PAPER_BLOCKS,)}),
        "linear machines, the run's blocks": here,
        "+ kernel machines": machines,
        "+ other blocks and poolings": layers,
        "+ contrast pairs": layers.model_copy(update={"contrast": "starter"}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=("paper", "same-source"))
    parser.add_argument("--out", type=Path, default=Path(".bench"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    store = TraceStore(arguments.out / "traces")
    seeds: dict[int, dict] = {}
    groups: dict[str, str] = {}
    for seed, run, splits, backbone in finished_runs(arguments):
        groups |= {p.id: p.group for p in splits.held_out}
        seeds[seed] = measured(backbone, run, splits, store, f"seed {seed}")
    # A seed whose run has no veto leaves that row out for all.
    names = [n for n in next(iter(seeds.values()))["steps"] if all(n in found["steps"] for found in seeds.values())]
    summary = {
        "protocol": arguments.protocol,
        "steps": [pooled(name, *(each(seeds, which) for which in (name, LEARNED)), groups) for name in names],
        "promise": {seed: found["promise"] for seed, found in seeds.items()},
    }
    print(json.dumps(summary, indent=1) if arguments.json else as_text(summary))


def each(seeds: dict[int, dict], step: str) -> list[dict]:
    return [found["steps"][step] for found in seeds.values()]


def finished_runs(arguments: argparse.Namespace) -> Iterator[tuple[int, Path, Splits, Backbone]]:
    """(seed, folder, its splits, its base) of every run of benchmarks/protocols.py that was asked for."""
    runs = {seed: arguments.out / f"{arguments.protocol}-seed{seed}" for seed in arguments.seeds}
    for run in runs.values():  # all of them before minutes are spent on the first
        read_config(run)
    for seed, run in runs.items():
        config = read_config(run)
        yield seed, run, recorded_split(config, run), load_backbone(config.model, dtype=config.dtype)


def measured(backbone: Backbone, run: Path, splits: Splits, store: TraceStore, where: str) -> dict:
    """A seed: per step which held-out prompts open and how edit prompts rank against harmful keeps; and the promise."""
    held_out = splits.held_out
    controller = load_controller(run / "controller", backbone)
    with torch.no_grad():
        logits = controller.weights.route(boundary_matrix(backbone, held_out, controller.config))[0].cpu().numpy()
    threshold = getattr(controller.policy, "threshold", 0.0)
    found = {LEARNED: step(held_out, logits, logits > threshold, "")}
    if bool(controller.weights.veto.fitted):
        _, vetoes = gate_logits(backbone, controller, held_out)
        order = [i for b in Bucket for i, p in enumerate(held_out) if p.bucket is b]
        veto = np.zeros(len(held_out))
        veto[order] = [v for b in Bucket for v in vetoes[b.value]]
        is_open = (logits > threshold) & (veto <= float(controller.weights.veto.threshold))
        found[f"{LEARNED} + veto"] = step(held_out, logits, is_open, "")
    for name, settings in steps_of(controller.config.route_layers, backbone.n_layers).items():
        learned_from = splits.train if ALONE in name else [*splits.train, *splits.calibration]
        gate, states = searched(backbone, store, learned_from, held_out, settings)
        logits = gate_scores(gate, states, held_out)
        found[name] = step(held_out, logits, logits > 0, gate.why())
        print(f"{where}: {name}: {gate.why()}", file=sys.stderr, flush=True)
    apart = [*splits.calibration, *held_out]
    gate, states = searched(backbone, store, splits.train, apart, settings)
    promised = {}
    for bucket in (Bucket.HARMFUL_KEEP, Bucket.BENIGN_KEEP):
        keeps = [p for p in apart if p.bucket is bucket]
        scores = gate_scores(gate, states, keeps)
        promised[bucket.value] = {of: resplit(scores, keeps, share, of != "of all") for of, share in PROMISED.items()}
        ids = {p.id for p in splits.calibration}
        here, there = ([i for i, p in enumerate(keeps) if (p.id in ids) == sets] for sets in (True, False))
        promised[bucket.value]["held out"] = promised_once(scores, keeps, here, there)
    return {"steps": found, "promise": promised}


def searched(
    backbone: Backbone, store: TraceStore, prompts: Sequence[Prompt], apart: Sequence[Prompt], settings: GateSearch
) -> tuple[FoundGate, dict[str, PromptStates]]:
    contrasts, _ = contrast_sets(settings.contrast, apart)
    every = {p.id: p for p in (*prompts, *apart, *(p for pairs in contrasts.values() for p in pairs))}
    states = prompt_states(backbone, store, list(every.values()))
    return search_gate(states, prompts, contrasts, settings, settings.layers), states


def gate_scores(gate: FoundGate, states: dict[str, PromptStates], prompts: Sequence[Prompt]) -> np.ndarray:
    machines = GateMachines(gate.shapes)
    for target, machine in zip(machines.machines, gate.machines, strict=True):
        target.load_state_dict(machine.state_dict())
    with torch.no_grad():
        return machines(torch.from_numpy(features(states, prompts, gate.layers, gate.pooling))).numpy()


def step(prompts: Sequence[Prompt], logits: np.ndarray, is_open: np.ndarray, why: str) -> dict:
    by = {b: [i for i, p in enumerate(prompts) if p.bucket is b] for b in Bucket}
    return {
        "auc": auc(logits[by[Bucket.EDIT]].tolist(), logits[by[Bucket.HARMFUL_KEEP]].tolist()),
        "open": {b.value: {prompts[i].id: bool(is_open[i]) for i in rows} for b, rows in by.items()},
        "scores": {prompts[i].id: float(logits[i]) for b in SIDES for i in by[b]},
        "why": why,
    }


def resplit(scores: np.ndarray, keeps: Sequence[Prompt], share: float, ahead: bool) -> dict:
    """How often the part that did not set the threshold opens more often than was promised."""
    groups = sorted({p.group for p in keeps})
    rng, each = np.random.default_rng(0), []
    for _ in range(RESPLITS):
        first = set(rng.permutation(groups)[: round(share * len(groups))].tolist())
        here, there = ([i for i, p in enumerate(keeps) if (p.group in first) == sets] for sets in (True, False))
        each.append(promised_once(scores, keeps, here, there, ahead=ahead))
        if each[-1]["threshold"] is None:
            return {"groups": len(groups), "first": each[-1]["first"], "resplits": 0, "exceeded": None}
    return {
        "groups": len(groups),
        "first": each[-1]["first"],
        "resplits": RESPLITS,
        "exceeded": float(np.mean([one["rate"] > ALPHA for one in each])),
        "by_arithmetic": by_arithmetic(len(groups), each[-1]["first"]) if each[-1]["allowed"] == 0 else None,
        "mean_rate": float(np.mean([one["rate"] for one in each])),
        "mean_prompt_rate": float(np.mean([one["prompt_rate"] for one in each])),
    }


def promised_once(
    scores: np.ndarray, keeps: Sequence[Prompt], here: Sequence[int], there: Sequence[int], *, ahead: bool = False
) -> dict:
    """The threshold that `here` allows, and what opens of `there`: of its groups, which are what is promised, at that
    threshold; of its prompts, at the one that is deployed (never below that of the search, 0)."""
    units = unit_scores(scores[there].tolist(), [keeps[i].group for i in there])
    made = promise(
        scores[here].tolist(),
        bucket=keeps[0].bucket.value,
        alpha=ALPHA,
        delta=DELTA,
        groups=[keeps[i].group for i in here],
        ahead=len(units) if ahead else None,
    )
    found = {"groups": made.n + len(units), "first": made.n, "allowed": made.allowed, "threshold": made.threshold}
    if made.threshold is None:
        return found
    deployed = scores[there] > max(0.0, made.threshold)
    return found | {"rate": float((units > made.threshold).mean()), "prompt_rate": float(deployed.mean())}


def by_arithmetic(groups: int, first: int) -> float:
    """P(more than alpha of the others score above the highest of `first` groups), whatever the scores: the highest of all
    must be among the others, one more of them than alpha allows."""
    highest = math.floor(ALPHA * (groups - first) + 1e-9) + 1
    return math.comb(groups - highest, first) / math.comb(groups, first)


def pooled(name: str, seeds: list[dict], reference: list[dict], groups: dict[str, str]) -> dict:
    rates = {b.value: pooled_rate([s["open"][b.value] for s in seeds], groups).model_dump() for b in Bucket}
    ours, theirs = ([won(s) for s in each] for each in (seeds, reference))
    return {
        "step": name,
        "auc": [s["auc"] for s in seeds],
        "auc_interval": redrawn(ours, seeds, groups),
        "difference": float(np.mean([a.mean() - b.mean() for a, b in zip(ours, theirs, strict=True)])),
        "difference_interval": redrawn([a - b for a, b in zip(ours, theirs, strict=True)], seeds, groups),
        "open": rates,
        "why": [s["why"] for s in seeds],
    }


def won(seed: dict) -> np.ndarray:
    """(n_edit, n_harmful): whether the edit prompt scores higher, ties half; its mean is the AUC."""
    edit, keeps = (np.array([seed["scores"][i] for i in seed["open"][b.value]]) for b in SIDES)
    return (edit[:, None] > keeps) + 0.5 * (edit[:, None] == keeps)


def redrawn(figures: Sequence[np.ndarray], seeds: Sequence[dict], groups: dict[str, str]) -> tuple[float, float]:
    """95 % of the mean over seeds of such figures; groups are redrawn with all their prompts in every seed."""
    place = {group: k for k, group in enumerate(sorted(set(groups.values())))}
    sides = [[np.array([place[groups[i]] for i in s["open"][b.value]]) for b in SIDES] for s in seeds]
    rng, found = np.random.default_rng(0), []
    for _ in range(REDRAWS):
        times = np.bincount(rng.integers(len(place), size=len(place)), minlength=len(place))
        drawn = [(times[edit], times[keeps]) for edit, keeps in sides]
        each = [e @ f @ k / max(e.sum() * k.sum(), 1) for f, (e, k) in zip(figures, drawn, strict=True)]
        found.append(np.mean(each))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def as_text(summary: dict) -> str:
    heads = (
        "step",
        "AUC edit / harmful (by seed)",
        "to the learned router",
        "edit open",
        "harmful keep open",
        "benign open",
    )
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in summary["steps"]:
        low, high = row["auc_interval"]
        aucs = f"{np.mean(row['auc']):.3f} [{low:.3f}, {high:.3f}] ({', '.join(f'{a:.3f}' for a in row['auc'])})"
        apart = "{:+.3f} [{:+.3f}, {:+.3f}]".format(row["difference"], *row["difference_interval"])
        rates = (rate(row["open"][b.value], seeds=False) for b in (Bucket.EDIT, Bucket.HARMFUL_KEEP, Bucket.BENIGN_KEEP))
        cells = (aucs, "" if row["step"].startswith(LEARNED) else apart, *rates)
        lines.append(f"| {row['step']} | {' | '.join(cells)} |")
    lines += [f"\nA promise of {ALPHA:g} at confidence {1 - DELTA:g}, {RESPLITS} resplits:\n"]
    heads = (
        "seed",
        "of",
        "promised",
        "groups that set it",
        "that count",
        "exceed",
        "by arithmetic",
        "groups open",
        "prompts open",
    )
    lines += ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for seed, buckets in summary["promise"].items():
        for bucket, kinds in buckets.items():
            for of, found in kinds.items():
                counts = found["groups"] - found["first"]
                cells = (str(seed), bucket, of, str(found["first"]), str(counts), *told(found))
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def told(found: dict) -> tuple[str, ...]:
    def percent(name: str) -> str:
        value = found.get(name)
        return "" if value is None else f"{100 * value:.1f} %"

    if found.get("threshold", 0) is None or found.get("exceeded", 0) is None:
        return ("too few groups for any", "", "", "")
    if "rate" in found:
        return ("", "", percent("rate"), percent("prompt_rate"))
    return tuple(percent(name) for name in ("exceeded", "by_arithmetic", "mean_rate", "mean_prompt_rate"))


if __name__ == "__main__":
    main()
