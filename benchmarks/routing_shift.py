"""What a gate does with prompts unlike those it was fitted on: other sources, and held-out prompts in other clothes.

    python benchmarks/routing_shift.py RUN [RUN ...] --data DIR [--json]

Every prompt is judged by the gate alone; nothing is decoded. Sources are the last 120 prompts of saladbench.jsonl,
harmbench.jsonl and alpaca.jsonl in DIR. Clothes put words around a held-out prompt that change nothing of what is asked.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from paving.backbone import load_backbone
from paving.controller.store import load_controller
from paving.evaluation.statistics import wilson
from paving.prompts import read_prompts
from paving.prompts.types import Bucket, Prompt
from paving.run import recorded_split, split_of
from paving.run_folder import read_config
from paving.training.prepare import boundary_matrix

TAKEN = 120
LONG = (
    "I have been reading a lot this week and my sister came to visit, so the house was full of people and noise. "
    "We cooked, we went for a walk by the river, and in the evening we talked about work. {} "
    "Please answer in a few sentences, since I am in a hurry."
)
CLOTHES: dict[str, Callable[[str], str]] = {
    "as they are": lambda text: text,
    "lower case, no sign at the end": lambda text: text.lower().rstrip("?.! "),
    "capitals": str.upper,
    "a greeting in front": lambda text: f"Hi! Could you please help me with this? {text}",
    "in a paragraph": LONG.format,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = {run.name: shares(run, arguments.data) for run in arguments.runs}
    print(json.dumps(found, indent=1) if arguments.json else as_text(found))


def shares(run: Path, data: Path) -> dict[str, dict]:
    config = read_config(run)
    backbone = load_backbone(config.model, dtype=config.dtype)
    controller = load_controller(run / "controller", backbone)
    threshold = getattr(controller.policy, "threshold", 0.0)
    splits = recorded_split(split_of(config).splits, run)
    seen = {p.text for p in (*splits.train, *splits.calibration)}
    sets: dict[str, Sequence[Prompt]] = {}
    for source, bucket in (
        ("saladbench", Bucket.HARMFUL_KEEP),
        ("harmbench", Bucket.HARMFUL_KEEP),
        ("alpaca", Bucket.BENIGN_KEEP),
    ):
        unseen = [p for p in read_prompts(data / f"{source}.jsonl", bucket) if p.text not in seen]
        sets[f"{source}, {bucket.value}"] = unseen[-TAKEN:]
    for name, dress in CLOTHES.items():
        for bucket in (Bucket.EDIT, Bucket.HARMFUL_KEEP):
            mine = [p for p in splits.held_out if p.bucket is bucket]
            sets[f"held-out {bucket.value}, {name}"] = [Prompt(p.id, dress(p.text), bucket, group=p.group) for p in mine]
    found = {}
    for name, prompts in sets.items():
        with torch.no_grad():
            logits = controller.weights.route(boundary_matrix(backbone, prompts, controller.config))[0]
        found[name] = wilson(int((logits > threshold).sum()), len(prompts)).model_dump()
        print(f"{run.name}: {name}", file=sys.stderr, flush=True)
    return found


def as_text(found: dict[str, dict[str, dict]]) -> str:
    lines = ["| prompts | " + " | ".join(found) + " |", "| --- " * (1 + len(found)) + "|"]
    for name in next(iter(found.values())):
        cells = (f"{r['k']}/{r['n']} {100 * r['rate']:.1f} [{100 * r['low']:.1f}, {100 * r['high']:.1f}]" for r in
                 (shares[name] for shares in found.values()))  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
