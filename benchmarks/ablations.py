"""Tables 2 and 19 on the cautious 135M model: the full recipe with one block of it changed; resumable.

    python benchmarks/ablations.py same-source
    python benchmarks/ablations.py paper --seeds 0 --only no-contrastive late-edits
    python benchmarks/ablations.py paper --finished     # the table of what is there, with the seeds of each row

The full recipe's runs come first: `python benchmarks/protocols.py PROTOCOL --data DIR`. All rows of a seed share its
prompts, targets, cached traces, and the scale that the full recipe chose. A killed command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from paving.ablations import ABLATIONS, ROW_MIXTURES, ROW_POLICIES, run_ablation, variant_of
from paving.run import Means, evaluate
from paving.run_folder import check_run
from protocols import figures_of, markdown, metrics_of, say, stage, watch


def main() -> None:
    names = [a.name for a in ABLATIONS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=("paper", "same-source"))
    parser.add_argument("--out", type=Path, default=Path(".bench"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=["rows", *names], default=["rows", *names])
    parser.add_argument("--finished", action="store_true", help="measure nothing")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    means = Means(cache=arguments.out / "traces", stage=stage, watch=watch, say=say)
    runs = {seed: arguments.out / f"{arguments.protocol}-seed{seed}" for seed in arguments.seeds}
    absent = [full for full in runs.values() if not (full / "metrics.json").exists()]
    if absent and (not arguments.finished or len(absent) == len(runs)):  # all of them before the first hour is spent
        sys.exit(f"{absent[0]} is not there. Run first: python benchmarks/protocols.py {arguments.protocol} --data DIR")
    trained = [n for n in arguments.only if n != "rows"]
    for full, name in [] if arguments.finished else [(full, name) for full in runs.values() for name in trained]:
        # Also of variants that are finished: all rows of a seed share the scale of its full recipe.
        check_run(variant_of(full, name), arguments.out / "ablations" / full.name / name)
    for seed, full in {} if arguments.finished else runs.items():
        if "rows" in arguments.only:
            evaluate(full, means, policies=ROW_POLICIES, mixtures=ROW_MIXTURES)
        for name in trained:
            folder = arguments.out / "ablations" / full.name / name
            if (folder / "metrics.json").exists():
                continue
            say(f"--- {arguments.protocol}, seed {seed}: {name}")
            run_ablation(full, name, folder, means)
    there = [seed for seed, full in runs.items() if full not in absent]
    summary = summarise(arguments.out, arguments.protocol, there)
    seeds = "-".join(map(str, there))
    (arguments.out / f"{arguments.protocol}-ablations-seeds{seeds}.json").write_text(
        json.dumps(summary, indent=1), encoding="utf-8"
    )
    print(json.dumps(summary, indent=1) if arguments.json else markdown(summary))


def summarise(out: Path, protocol: str, seeds: list[int]) -> dict:
    """Row name -> figures pooled over the seeds that have it; the deployed row of every variant stands for it."""
    rows: dict[str, dict] = {}
    folders = {seed: out / f"{protocol}-seed{seed}" for seed in seeds}
    for name in ("base", "learned", "learned+veto", "oracle", *ROW_POLICIES, *ROW_MIXTURES):
        there = {seed: (f, name) for seed, f in folders.items() if name in names_of(f)}
        add(rows, name, there, seeds)
    for variant in ABLATIONS:
        found = {seed: out / "ablations" / f"{protocol}-seed{seed}" / variant.name for seed in seeds}
        found = {seed: f for seed, f in found.items() if (f / "metrics.json").exists()}
        add(rows, f"{variant.name}: deployed", {s: (f, deployed(f)) for s, f in found.items()}, seeds)
        add(rows, f"{variant.name}: oracle", {s: (f, "oracle") for s, f in found.items()}, seeds)
    return {"seeds": seeds, "rows": rows}


def add(rows: dict[str, dict], name: str, there: dict[int, tuple[Path, str]], seeds: list[int]) -> None:
    """A row that not every seed has says which seeds it pools."""
    if there:
        short = "" if len(there) == len(seeds) else f" (seeds {', '.join(map(str, there))} only)"
        rows[name + short] = figures_of(list(there.values()))


def deployed(folder: Path) -> str:
    return "learned+veto" if "learned+veto" in names_of(folder) else "learned"


def names_of(folder: Path) -> list[str]:
    return [r.name for r in metrics_of(folder).rows]


if __name__ == "__main__":
    main()
