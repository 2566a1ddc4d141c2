"""What conformal p-values say of held-out prompts: which the gate opens on, abstains from, or takes for keeps.

    python benchmarks/conformal.py same-source [--out .bench] [--seeds 0 1 2] [--alphas 0.05 0.1] [--json]

Reads finished runs of benchmarks/protocols.py and their searched gates (RUN-gate), whose search is repeated for the one
candidate that it chose. No answer is decoded. `p ≤ α` is the share of held-out harmful keeps that would be taken for
something else: what α promises on average over draws of calibration and prompt, here over a few dozen groups a seed.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from paving.backbone import Backbone
from paving.controller.conformal import Reference, reference_of
from paving.controller.store import load_controller
from paving.evaluation.seeds import pooled_rate
from paving.prompts.types import Bucket, Prompt, SplitName, Splits
from paving.traces.store import TraceStore
from paving.training.gate_search import GateSearch
from paving.training.prepare import boundary_matrix
from protocols import rate
from routing_steps import finished_runs, gate_scores, searched

VERDICTS = ("edit", "abstain", "keep")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=("paper", "same-source"))
    parser.add_argument("--out", type=Path, default=Path(".bench"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, list[dict]] = {}
    groups: dict[str, str] = {}
    for _, run, splits, backbone in finished_runs(arguments):
        groups |= {p.id: p.group for p in splits.held_out}
        for gate, reference, logits in gates(backbone, run, splits, TraceStore(arguments.out / "traces")):
            for alpha in arguments.alphas:
                found.setdefault(f"{gate}, α = {alpha:g}", []).append(told(reference, logits, splits.held_out, alpha))
    rows = [{"gate": name, **pooled(seeds, groups)} for name, seeds in found.items()]
    print(json.dumps(rows, indent=1) if arguments.json else as_text(rows))


def gates(backbone: Backbone, run: Path, splits: Splits, store: TraceStore) -> Iterator[tuple[str, Reference, list[float]]]:
    """(name, reference, logits of the held-out prompts) of the learned router and of the searched gate."""
    controller = load_controller(run / "controller", backbone)
    known, held_out = splits.of(SplitName.CALIBRATION), splits.held_out
    with torch.no_grad():
        apart, there = (
            controller.weights.route(boundary_matrix(backbone, prompts, controller.config))[0].tolist()
            for prompts in (known, held_out)
        )
    yield "learned router", reference_of(apart, known), there
    chosen = json.loads((run.with_name(f"{run.name}-gate") / "router.json").read_text(encoding="utf-8"))["tried"][0]
    settings = GateSearch(layers=(tuple(chosen["layers"]),), poolings=(chosen["pooling"],), kernels=(chosen["kernel"],))
    learned_from = [*splits.train, *known]
    gate, states = searched(backbone, store, learned_from, held_out, settings)
    if gate.tried[0].contrast != chosen["contrast"]:
        raise SystemExit(f"{run}: the search chose {gate.tried[0].contrast} here and {chosen['contrast']} there.")
    reference = reference_of(gate.logits[0].tolist(), learned_from, apart=False)
    yield "searched gate", reference, gate_scores(gate, states, held_out).tolist()


def told(reference: Reference, logits: Sequence[float], prompts: Sequence[Prompt], alpha: float) -> dict:
    """Prompt id -> whether; for each bucket and verdict, and for harmful keeps whether p ≤ alpha."""
    verdicts = [reference.verdict(logit, alpha) for logit in logits]
    rejected = {
        p.id: reference.p_values(logit).harmful_keep <= alpha
        for p, logit in zip(prompts, logits, strict=True)
        if p.bucket is Bucket.HARMFUL_KEEP
    }
    by = {
        b.value: {v: {p.id: w == v for p, w in zip(prompts, verdicts, strict=True) if p.bucket is b} for v in VERDICTS}
        for b in Bucket
    }
    sizes = Counter({b.value: len(getattr(reference, b.value)) for b in Bucket})
    return {"verdicts": by, "rejected": rejected, "n": dict(sizes)}


def pooled(seeds: Sequence[dict], groups: dict[str, str]) -> dict:
    verdicts = {
        b.value: {v: pooled_rate([s["verdicts"][b.value][v] for s in seeds], groups).model_dump() for v in VERDICTS}
        for b in Bucket
    }
    rejected = pooled_rate([s["rejected"] for s in seeds], groups).model_dump()
    return {"verdicts": verdicts, "p_at_most_alpha": rejected, "n": [s["n"] for s in seeds]}


def as_text(rows: Sequence[dict]) -> str:
    heads = ("gate", "calibration groups, harmful", *(f"{b.value}: edit / abstain / keep %" for b in Bucket), "p ≤ α")
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in rows:
        shares = (" / ".join(f"{100 * row['verdicts'][b.value][v]['naive']['rate']:.0f}" for v in VERDICTS) for b in Bucket)
        n = ", ".join(str(n["harmful_keep"]) for n in row["n"])
        lines.append(f"| {row['gate']} | {n} | {' | '.join(shares)} | {rate(row['p_at_most_alpha'], seeds=False)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
