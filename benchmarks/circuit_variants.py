"""What each part of the selective recipe is worth, on one category: refusal against over-refusal over α; resumable.

    python benchmarks/circuit_variants.py --data DIR [--category crime_planning] [--only NAME ...] [--finished] [--json]

A variant is the selective recipe with some settings changed (see VARIANTS), found and trained as `paving circuit find` and
`edit` do; those on random channels find the circuit only to draw as many elsewhere. All figures are of calibration pairs,
which choose α: nothing is asked of held-out prompts. DIR holds CAST's cast_categories_train.jsonl. What is finished stands
in --kept, and is not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from circuits import CATEGORIES, LIMIT, Kept, add_shared, finished, keep, portable, reached, read_kept, shared
from paving.circuit_run import CircuitConfig, edit, find
from paving.circuit_run.config import with_recipe
from paving.circuit_run.evaluate import frontier_points
from paving.circuit_run.inputs import pairs_of
from paving.circuit_run.rows import comparator
from paving.circuit_run.stages import NoStrengthError, read_strengths, strengths_of
from paving.evaluation.refusal_policy import FrontierPoint
from paving.run import Means
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
    "κ = 100 %: every channel but the first block's": ({"fraction": 1.0}, False),
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
    parser.add_argument("--kept", type=Path, default=Path(__file__).parent / "measured" / "circuit-variants")
    parser.add_argument("--category", choices=CATEGORIES, default="crime_planning")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add_shared(parser)
    args = parser.parse_args()
    means = Means.default(stage=stage, watch=watch, say=say)
    found = {}
    for name in args.only:
        if not args.finished:
            measure(name, args, means)
        if kept_in(args, name).exists():
            found[name] = read_kept(kept_in(args, name)).curve
    print(json.dumps({k: [p.model_dump() for p in v] for k, v in found.items()}, indent=1) if args.json else as_text(found))


def kept_in(args: argparse.Namespace, name: str) -> Path:
    return args.kept / f"{args.category}-{SLUGS[name]}.json"


def measure(name: str, args: argparse.Namespace, means: Means) -> None:
    changes, random_channels = VARIANTS[name]
    config = configuration(args, changes)
    if finished(kept_in(args, name), config):
        return
    say(f"--- {name}")
    folder = args.out / kept_in(args, name).stem
    curve = frontier_points(curve_of(config, folder, means, random_channels=random_channels), None)
    keep(Kept(config=portable(config), metrics=None, curve=curve), kept_in(args, name))


def curve_of(config: CircuitConfig, folder: Path, means: Means, *, random_channels: bool) -> Sequence[StrengthPoint]:
    find(config, folder, means)
    if random_channels:
        backbone = means.load(config.model, config.dtype)
        train, calibration = pairs_of(config)
        fitted = comparator("random").fit(backbone, config, train, folder, means)
        return strengths_of(backbone, config, calibration, fitted.at, fitted.strengths, means)
    with suppress(NoStrengthError):  # no α within the limit is a result: the curve is kept all the same
        edit(folder, means)
    return read_strengths(folder / "strengths.json")[1]


def configuration(args: argparse.Namespace, changes: Mapping) -> CircuitConfig:
    content = with_recipe(shared(args, args.category), "selective")
    for key, value in changes.items():
        content[key] = {**content.get(key, {}), **value} if isinstance(value, Mapping) else value
    return CircuitConfig.model_validate(content)


def as_text(found: Mapping[str, Sequence[FrontierPoint]]) -> str:
    lines = ["| variant | category / benign refused %, by α | at the limit, 4.2 % |", "| --- | --- | --- |"]
    for name, points in found.items():
        cells = (f"{p.strength:g}: {100 * p.category_refused.rate:.0f} / {100 * p.benign_refused.rate:.0f}" for p in points)
        best = reached(points, LIMIT)
        lines.append(f"| {name} | {', '.join(cells)} | {'n/a' if best is None else f'{100 * best:.0f}'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
