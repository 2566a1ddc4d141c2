"""What each step towards a better gate is worth on prompts of unseen groups, and whether its promise holds.

    python benchmarks/routing_steps.py same-source [--out .bench] [--seeds 0 1 2] [--json]

Reads finished runs of benchmarks/protocols.py. Every step is a search of its own over what the step allows (see
paving.training.gate_search); held-out prompts are scored once, by what was chosen without them. No answer is decoded: what
an open gate does to the answer is in the runs of `paving router search RUN` and `paving eval`.

The promise: the last step's gate, fitted on training prompts alone; keeps of calibration and held-out split are divided
anew 200 times by group, one part sets the threshold, the other counts. Of all prompts to come it is promised on halves; of
the next ones, as many as the other part has, seven tenths set the threshold.
"""

from __future__ import annotations

import argparse
import json
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
from paving.run_splits import recorded_split
from paving.traces.prompt_states import PromptStates, prompt_states
from paving.traces.store import TraceStore
from paving.training.gate_search import FoundGate, GateSearch, default_layers, features, search_gate
from paving.training.prepare import boundary_matrix
from paving.training.promise import promise, unit_scores
from protocols import rate

RESPLITS, ALPHA, DELTA = 200, 0.1, 0.1
PROMISED = {"of all": 0.5, "of the next": 0.7}  # what is promised -> share of groups that sets the threshold


def steps_of(route_layers: tuple[int, ...], n_layers: int) -> dict[str, GateSearch]:
    """Each allows what the one before does, and one thing more."""
    here = GateSearch(layers=(route_layers,), poolings=("last+mean",), kernels=("linear",), contrast="none")
    machines = here.model_copy(update={"kernels": ("rbf", "linear")})
    layers = machines.model_copy(update={"layers": default_layers(n_layers), "poolings": ("last", "last+mean")})
    return {
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
    names = list(next(iter(seeds.values()))["steps"])
    summary = {
        "protocol": arguments.protocol,
        "steps": [pooled(name, [found["steps"][name] for found in seeds.values()], groups) for name in names],
        "promise": {seed: found["promise"] for seed, found in seeds.items()},
    }
    print(json.dumps(summary, indent=1) if arguments.json else as_text(summary))


def finished_runs(arguments: argparse.Namespace) -> Iterator[tuple[int, Path, Splits, Backbone]]:
    """(seed, folder, its splits, its base) of every run of benchmarks/protocols.py that was asked for."""
    for seed in arguments.seeds:
        run = arguments.out / f"{arguments.protocol}-seed{seed}"
        config = read_config(run)
        yield seed, run, recorded_split(config, run), load_backbone(config.model, dtype=config.dtype)


def measured(backbone: Backbone, run: Path, splits: Splits, store: TraceStore, where: str) -> dict:
    """A seed: per step which held-out prompts open and how edit prompts rank against harmful keeps; and the promise."""
    held_out = splits.held_out
    controller = load_controller(run / "controller", backbone)
    with torch.no_grad():
        logits = controller.weights.route(boundary_matrix(backbone, held_out, controller.config))[0].cpu().numpy()
    threshold = getattr(controller.policy, "threshold", 0.0)
    found = {"learned router": step(held_out, logits, logits > threshold, "")}
    for name, settings in steps_of(controller.config.route_layers, backbone.n_layers).items():
        gate, states = searched(backbone, store, [*splits.train, *splits.calibration], held_out, settings)
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
        "why": why,
    }


def resplit(scores: np.ndarray, keeps: Sequence[Prompt], share: float, ahead: bool) -> dict:
    """How often the part that did not set the threshold opens more often than was promised."""
    groups = sorted({p.group for p in keeps})
    rng, exceeded, rates = np.random.default_rng(0), 0, []
    for _ in range(RESPLITS):
        first = set(rng.permutation(groups)[: round(share * len(groups))].tolist())
        here = [i for i, p in enumerate(keeps) if p.group in first]
        there = [i for i, p in enumerate(keeps) if p.group not in first]
        units = unit_scores(scores[there].tolist(), [keeps[i].group for i in there])
        made = promise(
            scores[here].tolist(),
            bucket=keeps[0].bucket.value,
            alpha=ALPHA,
            delta=DELTA,
            groups=[keeps[i].group for i in here],
            ahead=len(units) if ahead else None,
        )
        if made.threshold is None:
            return {"groups": len(groups), "first": made.n, "resplits": 0, "exceeded": None, "mean_rate": None}
        rates.append(float((units > made.threshold).mean()))
        exceeded += rates[-1] > ALPHA
    return {
        "groups": len(groups),
        "first": made.n,
        "resplits": RESPLITS,
        "exceeded": exceeded / RESPLITS,
        "mean_rate": float(np.mean(rates)),
    }


def pooled(name: str, seeds: list[dict], groups: dict[str, str]) -> dict:
    rates = {b.value: pooled_rate([s["open"][b.value] for s in seeds], groups).model_dump() for b in Bucket}
    return {"step": name, "auc": [s["auc"] for s in seeds], "open": rates, "why": [s["why"] for s in seeds]}


def as_text(summary: dict) -> str:
    heads = ("step", "AUC edit / harmful (by seed)", "edit open", "harmful keep open", "benign keep open")
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in summary["steps"]:
        aucs = f"{np.mean(row['auc']):.3f} ({', '.join(f'{a:.3f}' for a in row['auc'])})"
        rates = (rate(row["open"][b.value], seeds=False) for b in (Bucket.EDIT, Bucket.HARMFUL_KEEP, Bucket.BENIGN_KEEP))
        lines.append(f"| {row['step']} | {aucs} | {' | '.join(rates)} |")
    lines += [f"\nA promise of {ALPHA:g} at confidence {1 - DELTA:g}, {RESPLITS} resplits:\n"]
    lines += ["| seed | of | promised | groups that set it | that count | exceed | open |", "| --- " * 7 + "|"]
    for seed, buckets in summary["promise"].items():
        for bucket, kinds in buckets.items():
            for of, found in kinds.items():
                told = "too few groups for any | "
                if found["exceeded"] is not None:
                    told = f"{100 * found['exceeded']:.1f} % | {100 * found['mean_rate']:.1f} %"
                counts = found["groups"] - found["first"]
                lines.append(f"| {seed} | {bucket} | {of} | {found['first']} | {counts} | {told} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
