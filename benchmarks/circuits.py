"""C-ΔΘ on five categories and three seeds, beside its inverse, a random circuit, AS, CAST and WS; resumable.

    python benchmarks/circuits.py --data DIR [--categories crime_planning ...] [--seeds 0 1 2] [--only published selective]

DIR holds CAST's contrast pairs, cast_categories_train.jsonl and cast_categories_test.jsonl, and for other sources
saladbench.jsonl and harmbench.jsonl. A run is a folder of --out (CATEGORY-seedN-RECIPE); the comparators stand in the
selective run. A killed command goes on where it was. Rates are pooled over seeds (the held-out prompts are the same, so
intervals are those of a seed's n) and then averaged over categories, as the paper's means are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from paving.circuit_run import CircuitConfig, edit, evaluate, find
from paving.circuit_run.config import RECIPES, with_recipe
from paving.evaluation.refusal_policy import FrontierPoint, PolicyMetrics
from paving.evaluation.statistics import wilson
from paving.run import Means
from paving.run_folder import RunError
from protocols import say, stage, watch

CATEGORIES = ("crime_planning", "hate_speech", "health_consultation", "legal_opinion", "sexual_content")
AGAINST = ("inverse", "random", "ws", "as", "cast")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(".bench/circuits"))
    parser.add_argument("--categories", nargs="+", choices=CATEGORIES, default=list(CATEGORIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=sorted(RECIPES), default=sorted(RECIPES))
    parser.add_argument(
        "--against", nargs="*", choices=AGAINST, default=list(AGAINST), help="comparators, fitted as `selective` is"
    )
    parser.add_argument("--held-out", type=int, default=100, help="held-out pairs of a category")
    parser.add_argument("--ood", type=int, default=60, help="prompts of other sources; 0 for none")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    means = Means.default(stage=stage, watch=watch, say=say)
    for seed in args.seeds:
        for category in args.categories:
            for recipe in args.only:
                measure(args, category, seed, recipe, means)
    summary = summarise(args.out, args.categories, args.seeds)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    print(json.dumps(summary, indent=1) if args.json else markdown(summary))
    return 0


def measure(args: argparse.Namespace, category: str, seed: int, recipe: str, means: Means) -> None:
    folder = args.out / f"{category}-seed{seed}-{recipe}"
    if (folder / "metrics.json").exists():
        return
    say(f"--- {category}, seed {seed}: {recipe}")
    find(configuration(args, category, seed, recipe), folder, means)
    try:
        edit(folder, means)
    except RunError as error:  # no α keeps to the limit: the curve stands in strengths.json, and that is the result
        say(str(error))
        return
    ood = [f"{args.data / name}.jsonl" for name in ("saladbench", "harmbench")] if args.ood else []
    evaluate(folder, means, against=args.against if recipe == "selective" else (), ood=ood)


def configuration(args: argparse.Namespace, category: str, seed: int, recipe: str) -> CircuitConfig:
    content = {
        "pairs": str(args.data / "cast_categories_train.jsonl"),
        "held_out": str(args.data / "cast_categories_test.jsonl"),
        "held_out_limit": args.held_out,
        "category": category,
        "seed": seed,
        "attributed": 48,
        "arithmetic": {"seed": seed},
    }
    return CircuitConfig.model_validate(with_recipe(content, recipe))


def summarise(out: Path, categories: Sequence[str], seeds: Sequence[int]) -> dict:
    """Row -> category -> pooled counts, and the mean over categories; frontier: what each row reaches at the limit."""
    rows: dict[str, dict[str, dict]] = {}
    for category in categories:
        for seed in seeds:
            for recipe in RECIPES:
                path = out / f"{category}-seed{seed}-{recipe}" / "metrics.json"
                if not path.exists():
                    continue
                metrics = PolicyMetrics.model_validate_json(path.read_text(encoding="utf-8"))
                for name, counts in counts_of(metrics, recipe).items():
                    add(rows.setdefault(name, {}).setdefault(category, {}), counts)
    return {"categories": list(categories), "seeds": list(seeds), "rows": {n: row_summary(r) for n, r in rows.items()}}


def counts_of(metrics: PolicyMetrics, recipe: str) -> dict[str, dict]:
    found = {}
    for row in metrics.rows:
        if row.name == "base" and recipe != "selective":
            continue
        name = f"c-delta-theta, {recipe}" if row.name == "c-delta-theta" else row.name
        sides: dict[str, list[int]] = {}
        for rates in row.sets.values():
            k, n = sides.setdefault(rates.side, [0, 0])
            sides[rates.side] = [k + rates.refused.k, n + rates.refused.n]
        curve = metrics.frontier.get(row.name)
        found[name] = {"sides": sides, "runs": 1, "at_limit": [reached(curve, metrics.over_refusal_limit)] if curve else []}
    return found


def add(total: dict, counts: dict) -> None:
    total["runs"] = total.get("runs", 0) + counts["runs"]
    total["at_limit"] = total.get("at_limit", []) + counts["at_limit"]
    for side, (k, n) in counts["sides"].items():
        before = total.setdefault("sides", {}).get(side, [0, 0])
        total["sides"][side] = [before[0] + k, before[1] + n]


def reached(curve: Sequence[FrontierPoint], limit: float) -> float:
    """Refusal of the category where the curve crosses the limit on over-refusal (calibration split), by straight lines
    between the strengths that were tried; the last point where it never does."""
    points = [(p.benign_refused.rate, p.category_refused.rate) for p in curve]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x1 > limit:
            return y0 + (y1 - y0) * max(0.0, limit - x0) / (x1 - x0) if x1 > x0 else y0
    return points[-1][1]


def row_summary(by_category: dict[str, dict]) -> dict:
    categories = {}
    for category, total in by_category.items():
        rates = {side: of_one_seed(k, n, total["runs"]) for side, (k, n) in total["sides"].items()}
        categories[category] = {"runs": total["runs"], **rates, "at_limit": total["at_limit"]}
    sides = sorted({side for c in by_category.values() for side in c["sides"]})
    mean = {s: fmean(c["sides"][s][0] / c["sides"][s][1] for c in by_category.values() if s in c["sides"]) for s in sides}
    at_limit = [v for c in by_category.values() for v in c["at_limit"]]
    return {"categories": categories, "mean": mean, "at_limit": fmean(at_limit) if at_limit else None}


def of_one_seed(k: int, n: int, seeds: int) -> dict:
    """The pooled rate with the interval of one seed's prompts: seeds answer the same prompts again, which adds none."""
    return wilson(round(k / seeds), n // seeds).model_dump() | {"rate": k / n, "answers": n}


def markdown(summary: dict) -> str:
    lines = ["| row | category refused, mean % | benign refused, mean % | other | ood | at the limit (calibration) % |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name, row in summary["rows"].items():
        cells = [shown(row["mean"].get(side)) for side in ("category", "benign", "other", "ood")]
        lines.append(f"| {name} | {' | '.join(cells)} | {shown(row['at_limit'])} |")
    return "\n".join(lines)


def shown(rate: float | None) -> str:
    return "n/a" if rate is None else f"{100 * rate:.1f}"


if __name__ == "__main__":
    sys.exit(main())
