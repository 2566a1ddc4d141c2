"""C-ΔΘ on five categories and three seeds, beside its inverse, a random circuit, AS, CAST and WS; resumable.

    python benchmarks/circuits.py --data DIR [--categories crime_planning ...] [--seeds 0 1 2] [--only published selective]
    python benchmarks/circuits.py --data DIR --finished     # tables and picture of what is there

DIR holds CAST's contrast pairs, cast_categories_train.jsonl and cast_categories_test.jsonl, and for other sources
saladbench.jsonl and harmbench.jsonl. A run is a folder of --out (CATEGORY-seedN-RECIPE); the comparators stand in the
selective run. A killed command goes on where it was. Counts of a finished run, and no prompt or answer, are written to
--kept, a file a run: what is there is not measured again, on any machine. Rates are pooled over seeds (the held-out prompts
are the same, so intervals are those of one seed's n, and seeds stand beside); the mean over categories is the paper's, its
interval that of all their prompts. "At the limit" is the most of the category that a row's curve on the calibration pairs
refuses within the limit on over-refusal.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict

from paving.circuit_run import CircuitConfig, StrengthConfig, edit, evaluate, find
from paving.circuit_run.config import RECIPES, with_recipe
from paving.circuit_run.evaluate import EDIT, frontier_points
from paving.circuit_run.stages import NoStrengthError, read_strengths
from paving.evaluation.refusal_policy import FrontierPoint, PolicyMetrics, PolicyRow
from paving.evaluation.results import Rate
from paving.evaluation.statistics import wilson
from paving.run import Means
from protocols import say, stage, watch

CATEGORIES = ("crime_planning", "hate_speech", "health_consultation", "legal_opinion", "sexual_content")
LIMIT = StrengthConfig().limit
ENOUGH = 0.15  # over-refusal beyond which a curve ends: what costs so much is nobody's choice
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a34f8f", "#a96d00", "#56b4e9", "#5c6570")
# Three times the paper's rate for a quarter of its epochs: a fine-tune of all weights costs what a run does.
WEIGHT_STEERING = {"learning_rate": 3e-5, "epochs": 2}
OWN = ("category", "benign")
AGAINST = ("inverse", "random", "ws", "as", "cast")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(".bench/circuits"))
    parser.add_argument("--kept", type=Path, default=Path(__file__).parent / "measured" / "circuits")
    parser.add_argument("--categories", nargs="+", choices=CATEGORIES, default=list(CATEGORIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=sorted(RECIPES), default=sorted(RECIPES))
    parser.add_argument(
        "--against", nargs="*", choices=AGAINST, default=list(AGAINST), help="comparators, fitted as `selective` is"
    )
    parser.add_argument("--held-out", type=int, default=100, help="held-out pairs of a category")
    parser.add_argument("--others", type=int, default=10, help="prompts of every other category and source")
    parser.add_argument(
        "--also-benign", help="further benign prompts of the selective recipe, as `starter`; with another --out and --kept"
    )
    parser.add_argument("--published-pairs", type=int, default=300, help="of the published recipe, those for α included")
    add_shared(parser)
    args = parser.parse_args(argv)
    means = Means.default(stage=stage, watch=watch, say=say)
    for seed in () if args.finished else args.seeds:
        for category in args.categories:
            for recipe in args.only:
                measure(args, category, seed, recipe, means)
    runs = list(measured(args.kept, args.categories, args.seeds))
    if not runs:
        sys.exit(f"nothing is measured in {args.kept} for {', '.join(args.categories)} and seeds {args.seeds}.")
    summary = summarise(runs)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    draw_frontier(summary, args.out / "frontier.png")
    print(json.dumps(summary, indent=1) if args.json else markdown(summary))
    return 0


def add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calibration", type=int, default=100, help="pairs that α is chosen by")
    parser.add_argument("--tokens", type=int, default=32, help="length of all answers, of those that choose α, too")
    parser.add_argument("--finished", action="store_true", help="measure nothing")
    parser.add_argument("--json", action="store_true")


class Kept(BaseModel):
    """A finished run's counts. metrics: None where no α keeps to the limit, so that there is a curve and no row."""

    model_config = ConfigDict(extra="forbid")

    config: CircuitConfig
    metrics: PolicyMetrics | None
    curve: list[FrontierPoint]


def measure(args: argparse.Namespace, category: str, seed: int, recipe: str, means: Means) -> None:
    name = f"{category}-seed{seed}-{recipe}"
    folder, kept = args.out / name, args.kept / f"{name}.json"
    against = args.against if recipe == "selective" else ()
    config = configuration(args, category, seed, recipe)
    if finished(kept, config, against):
        return
    say(f"--- {category}, seed {seed}: {recipe}")
    find(config, folder, means)
    try:
        edit(folder, means)
    except NoStrengthError as error:  # the curve stands in strengths.json, and that is the result
        say(str(error))
        _, points = read_strengths(folder / "strengths.json")
        found = Kept(config=portable(config), metrics=None, curve=frontier_points(points, None))
    else:
        ood = [f"{args.data / name}.jsonl" for name in ("saladbench", "harmbench")]
        metrics = evaluate(folder, means, against=against, ood=ood)
        files = {name: Path(source).name for name, source in metrics.ood.items()}
        own = [row for row in metrics.rows if row.name not in metrics.deltas]  # further deltas are no part of this benchmark
        metrics = metrics.model_copy(update={"ood": files, "deltas": {}, "rows": own})
        found = Kept(config=portable(config), metrics=metrics, curve=metrics.frontier[EDIT])
    keep(found, kept)


def keep(found: BaseModel, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(found.model_dump_json() + "\n", encoding="utf-8")
    partial.replace(path)


def finished(path: Path, config: CircuitConfig, against: Sequence[str] = ()) -> bool:
    """Whether a run's figures are kept with all these comparators. Stops where they are of another configuration: that
    recipe's figures are not this one's."""
    if not path.exists():
        return False
    kept = read_kept(path)
    if kept.config != portable(config):
        sys.exit(f"{path} was measured with other settings; move it away, or give another --kept.")
    return kept.metrics is None or set(against) <= set(kept.metrics.frontier)


def read_kept(path: Path) -> Kept:
    return Kept.model_validate_json(path.read_text(encoding="utf-8"))


def portable(config: CircuitConfig) -> CircuitConfig:
    """The same on every machine: where the data lie is no part of what was measured."""
    paths = {key: getattr(config, key) for key in ("pairs", "held_out", "also_benign")}
    return config.model_copy(update={key: path and Path(path).name for key, path in paths.items()})


def configuration(args: argparse.Namespace, category: str, seed: int, recipe: str) -> CircuitConfig:
    content = shared(args, category) | {
        "held_out": str(args.data / "cast_categories_test.jsonl"),
        "held_out_limit": args.held_out,
        "others_limit": args.others,
        "seed": seed,
        "limit": args.published_pairs if recipe == "published" else None,
        "arithmetic": {"seed": seed},
        "weight_steering": WEIGHT_STEERING,
        "also_benign": args.also_benign if recipe == "selective" else None,
    }
    return CircuitConfig.model_validate(with_recipe(content, recipe))


def shared(args: argparse.Namespace, category: str) -> dict:
    """What every run here and in circuit_variants.py has: its pairs, and how α is chosen."""
    return {
        "pairs": str(args.data / "cast_categories_train.jsonl"),
        "category": category,
        "attributed": 48,
        "calibration": args.calibration,
        "decoding": {"max_new_tokens": args.tokens},
        "strength": {"enough": ENOUGH},
    }


class Run(NamedTuple):
    """metrics: None where no α kept to the limit, so that there is a curve and no row."""

    category: str
    seed: int
    recipe: str
    metrics: PolicyMetrics | None
    curves: dict[str, Sequence[FrontierPoint]]

    def named(self, row: str) -> str:
        return f"{EDIT}, {self.recipe}" if row == EDIT else row


def measured(kept: Path, categories: Sequence[str], seeds: Sequence[int]) -> Iterator[Run]:
    for category, seed, recipe in product(categories, seeds, RECIPES):
        path = kept / f"{category}-seed{seed}-{recipe}.json"
        if path.exists():
            found = read_kept(path)
            curves = found.metrics.frontier if found.metrics else {EDIT: found.curve}
            yield Run(category, seed, recipe, found.metrics, curves)


def summarise(runs: Sequence[Run]) -> dict:
    """Row -> its seeds, side -> category -> rate, mean over categories, and curve on the calibration splits."""
    names = dict.fromkeys(["base", *(r.named(name) for r in runs for name in r.curves)])
    return {name: row_summary(name, runs) for name in names}


def row_summary(name: str, runs: Sequence[Run]) -> dict:
    mine = [(r, row) for r in runs if r.metrics for row in r.metrics.rows if r.named(row.name) == name]
    curves = [r.curves[n] for r in runs for n in r.curves if r.named(n) == name]
    sides: dict[str, dict[str, list[tuple[int, int]]]] = {}
    asked: dict[str, dict[str, int]] = {}  # side -> set -> its prompts: benign ones are the same for every category
    for run, row in mine:
        for name_of_set, s in row.sets.items():
            known = asked.setdefault(s.side, {})
            known[name_of_set] = max(s.refused.n, known.get(name_of_set, 0))
        for side in dict.fromkeys(s.side for s in row.sets.values()):
            refused = [s.refused for s in row.sets.values() if s.side == side]
            sides.setdefault(side, {}).setdefault(run.category, []).append(
                (sum(r.k for r in refused), sum(r.n for r in refused))
            )
    return {
        "seeds": sorted({r.seed for r, _ in mine}),
        "runs": len(curves) or len(mine),
        "without_strength": len(curves) - len(mine) if curves else 0,
        "touched": max((r.metrics.touched for r, _ in mine), default=None),
        "sides": {side: {c: pooled(counts) for c, counts in by.items()} for side, by in sides.items()},
        "mean": {
            side: mean_of([pooled(counts) for counts in by.values()], sum(asked[side].values()))
            for side, by in sides.items()
        },
        "by_seed": by_seed(mine),
        "at_limit": mean_reached([(r, r.curves[n]) for r in runs for n in r.curves if r.named(n) == name]),
        "curve": pooled_curve(curves),
    }


def by_seed(mine: Sequence[tuple[Run, PolicyRow]]) -> dict[int, dict[str, float]]:
    """Seed -> side -> mean over the categories, of seeds that have them all."""
    found: dict[int, dict[str, float]] = {}
    for seed in sorted({run.seed for run, _ in mine}):
        rows = [row for run, row in mine if run.seed == seed]
        if len(rows) == len({run.category for run, _ in mine}):
            rates = {side: [s.refused.rate for row in rows for s in row.sets.values() if s.side == side] for side in OWN}
            found[seed] = {side: fmean(of_side) for side, of_side in rates.items()}
    return found


def mean_reached(curves: Sequence[tuple[Run, Sequence[FrontierPoint]]]) -> dict | None:
    """What `reached` says of every curve: the mean over categories of their means over seeds, and over the categories of
    each seed that has them all."""
    found = {(run.category, run.seed): y for run, curve in curves if (y := reached(curve, LIMIT)) is not None}
    if not found:
        return None
    categories, seeds = (sorted(set(keys)) for keys in zip(*found, strict=True))
    of_category = [fmean(y for (c, _), y in found.items() if c == category) for category in categories]
    whole = {s: [found[c, s] for c in categories if (c, s) in found] for s in seeds}
    by_seed = {seed: fmean(each) for seed, each in whole.items() if len(each) == len(categories)}
    return {"rate": fmean(of_category), "by_seed": by_seed, "runs": len(found)}


def pooled(counts: Sequence[tuple[int, int]]) -> dict:
    """(k, n) of every run: the rate of all answers, with the interval of one run's prompts: others answer the same again."""
    k, n = map(sum, zip(*counts, strict=True))
    prompts = max(n for _, n in counts)
    return wilson(round(k / n * prompts), prompts).model_dump() | {"rate": k / n, "answers": n}


def mean_of(each: Sequence[dict], prompts: int) -> dict:
    """The mean of the categories' rates, with the interval of so many different prompts."""
    mean = fmean(e["rate"] for e in each)
    return wilson(round(mean * prompts), prompts).model_dump() | {"rate": mean, "categories": len(each)}


def pooled_curve(curves: Sequence[Sequence[FrontierPoint]]) -> list[dict]:
    """Strength by strength, mean refusal of the category and of benign prompts, where every run went so far."""
    strengths = [p.strength for p in curves[0]] if curves else []
    found = []
    for i, strength in enumerate(strengths):
        points = [c[i] for c in curves if i < len(c)]
        if len(points) == len(curves):  # AS and CAST have strengths of their own in every run: the i-th of each
            benign, category = (fmean(r.rate for r in side) for side in zip(*map(both, points), strict=True))
            found.append({"strength": strength, "benign": benign, "category": category})
    return found


def both(point: FrontierPoint) -> tuple[Rate, Rate]:
    return point.benign_refused, point.category_refused


def reached(curve: Sequence[FrontierPoint], limit: float) -> float | None:
    """The most of the category that the curve refuses within the limit on over-refusal (calibration split), by straight
    lines between the strengths that were tried; None where even the base is over it."""
    points = [(p.benign_refused.rate, p.category_refused.rate) for p in curve]
    within = [y for x, y in points if x <= limit]
    for (x0, y0), (x1, y1) in pairwise(points):
        if min(x0, x1) <= limit < max(x0, x1):
            within.append(y0 + (y1 - y0) * (limit - x0) / (x1 - x0))
    return max(within, default=None)


def draw_frontier(summary: dict, path: Path) -> None:
    """The whole frontier, a curve a row: mean refusal of the category against that of benign prompts."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color="#5c6570", linewidth=1, linestyle=":", label="refuses both alike")
    axes.axvline(100 * LIMIT, color="#1f2328", linewidth=1, linestyle="--", label=f"limit, {percents(LIMIT)}%")
    looks = zip(COLOURS, "os^Dv<P", strict=True)
    for (name, row), (colour, marker) in zip(((n, r) for n, r in summary.items() if r["curve"]), looks, strict=False):
        x, y = ([100 * p[side] for p in row["curve"]] for side in ("benign", "category"))
        axes.plot(x, y, color=colour, marker=marker, markersize=5, label=name)
    reach = max((100 * p["benign"] for row in summary.values() for p in row["curve"]), default=0)
    axes.set(
        xlim=(-1, min(100, reach + 5)), ylim=(-2, 102), xlabel="benign prompts refused, %", ylabel="category refused, %"
    )
    axes.legend(loc="upper right", fontsize=9)
    figure.savefig(path, dpi=160)


def markdown(summary: dict) -> str:
    sides = ("category", "benign", "other", "ood")
    lines = [
        "| row | runs | category refused % (by seed) | benign % (by seed) | others % | ood % | at the limit % (by seed) |"
    ]
    lines.append("| --- |" + " --- |" * 6)
    for name, row in summary.items():
        cells = [shown(row["mean"].get(side)) + seeds_shown(row["by_seed"], side) for side in sides[:2]]
        cells += [shown(row["mean"].get(side)) for side in sides[2:]]
        absent = f" ({row['without_strength']} without α)" if row["without_strength"] else ""
        limit = row["at_limit"]
        seeds = listed(limit["by_seed"].values()) if limit and len(limit["by_seed"]) > 1 else ""
        at_limit = f"{percents(limit['rate'])}{seeds}" if limit else "n/a"
        lines.append(f"| {name} | {row['runs']}{absent} | {' | '.join(cells)} | {at_limit} |")
    categories = list(dict.fromkeys(c for row in summary.values() for c in row["sides"].get("category", {})))
    lines += ["", f"| category / benign refused % | {' | '.join(categories)} |", "| --- |" + " --- |" * len(categories)]
    for name, row in summary.items():
        cells = [" / ".join(shown(row["sides"].get(side, {}).get(c)) for side in OWN) for c in categories]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def seeds_shown(means: dict[int, dict[str, float]], side: str) -> str:
    return listed(of_seed[side] for of_seed in means.values()) if len(means) > 1 else ""


def listed(rates: Iterable[float]) -> str:
    return f" ({', '.join(f'{100 * r:.0f}' for r in rates)})"


def shown(rate: dict | None) -> str:
    return "n/a" if rate is None else f"{percents(rate['rate'])} [{percents(rate['low'])}, {percents(rate['high'])}]"


def percents(rate: float | None) -> str:
    return "n/a" if rate is None else f"{100 * rate:.1f}"


if __name__ == "__main__":
    sys.exit(main())
