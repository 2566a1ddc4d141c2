"""What each part of the selective recipe is worth, on one category: refusal against over-refusal over α; resumable.

    python benchmarks/circuit_variants.py --data DIR [--category crime_planning] [--only NAME ...] [--finished] [--json]

A variant is the selective recipe with some settings changed (see VARIANTS), found and trained as `paving circuit find` and
`edit` do; those on random channels find the circuit only to draw as many elsewhere. All figures are of calibration pairs,
which choose α: nothing is asked of held-out prompts. DIR holds CAST's cast_categories_train.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from circuits import CATEGORIES, LIMIT, finished, reached
from paving.circuit_run import CircuitConfig, edit, find
from paving.circuit_run.config import with_recipe
from paving.circuit_run.evaluate import frontier_points
from paving.circuit_run.inputs import pairs_of
from paving.circuit_run.rows import comparator
from paving.circuit_run.stages import kept_strengths, read_strengths, strengths_of
from paving.run import Means
from paving.run_folder import RunError
from paving.training.strength import StrengthPoint
from protocols import say, stage, watch

NARROW, WIDE = {"fraction": 0.03}, {"fraction": 0.15}
SLOW = {"arithmetic": {"learning_rate": 2e-4, "epochs": 3, "retain_weight": 1.0}}
# name -> (settings laid over the recipe's, whether on random channels)
VARIANTS: dict[str, tuple[Mapping, bool]] = {
    "selective": ({}, False),
    "selective, random channels": ({}, True),
    "κ = 3 %": (NARROW, False),
    "κ = 3 %, random channels": (NARROW, True),
    "κ = 15 %": (WIDE, False),
    "κ = 15 %, random channels": (WIDE, True),
    "rows (`outputs`)": ({"attribution": {"reading": "outputs"}}, False),
    "signed attribution": ({"attribution": {"signed": True}}, False),
    "chosen over all layers": ({"scope": "global"}, False),
    "layers of an edge-level circuit": ({"edges": 2000}, False),
    "no retain term": ({"arithmetic": {"retain": "none"}}, False),
    "retain by cross-entropy": ({"arithmetic": {"retain": "ce"}}, False),
    "with θ−": ({"arithmetic": {"minus": True}}, False),
    "3 epochs at 2e-4, weight 1": (SLOW, False),
}

SLUGS = {name: "-".join("".join(c if c.isalnum() and c.isascii() else " " for c in name).split()) for name in VARIANTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(".bench/circuit-variants"))
    parser.add_argument("--category", choices=CATEGORIES, default="crime_planning")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--finished", action="store_true", help="measure nothing")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    means = Means.default(stage=stage, watch=watch, say=say)
    found = {}
    for name in args.only:
        folder = args.out / f"{args.category}-{SLUGS[name]}"
        if not args.finished:
            say(f"--- {name}")
            measure(name, args, folder, means)
        if (folder / "curve.json").exists():
            found[name] = read_strengths(folder / "curve.json")[1]
    print(json.dumps({k: [asdict(p) for p in v] for k, v in found.items()}, indent=1) if args.json else as_text(found))


def measure(name: str, args: argparse.Namespace, folder: Path, means: Means) -> None:
    changes, random_channels = VARIANTS[name]
    config = configuration(args, changes)

    def curve() -> Sequence[StrengthPoint]:
        find(config, folder, means)
        if random_channels:
            backbone = means.load(config.model, config.dtype)
            train, calibration = pairs_of(config)
            fitted = comparator("random").fit(backbone, config, train, folder, means)
            return strengths_of(backbone, config, calibration, fitted.at, fitted.strengths, means)
        try:
            edit(folder, means)
        except RunError as error:  # no α within the limit is a result: the curve is kept all the same
            say(str(error))
        return read_strengths(folder / "strengths.json")[1]

    if not finished(folder / "curve.json", config):
        folder.mkdir(parents=True, exist_ok=True)
        kept_strengths(folder / "curve.json", config.judge, curve)


def configuration(args: argparse.Namespace, changes: Mapping) -> CircuitConfig:
    content = {
        "pairs": str(args.data / "cast_categories_train.jsonl"),
        "category": args.category,
        "attributed": 48,
        "calibration": 60,
        "strength": {"max_new_tokens": 16},
    }
    content = with_recipe(content, "selective")
    for key, value in changes.items():
        content[key] = {**content.get(key, {}), **value} if isinstance(value, Mapping) else value
    return CircuitConfig.model_validate(content)


def as_text(found: Mapping[str, Sequence[StrengthPoint]]) -> str:
    lines = ["| variant | category / benign refused %, by α | at the limit, 4.2 % |", "| --- | --- | --- |"]
    for name, points in found.items():
        cells = (f"{p.strength:g}: {100 * p.harmful_refusal:.0f} / {100 * p.over_refusal:.0f}" for p in points)
        at_limit = 100 * reached(frontier_points(points, None), LIMIT)
        lines.append(f"| {name} | {', '.join(cells)} | {at_limit:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
