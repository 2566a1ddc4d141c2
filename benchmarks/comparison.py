"""Comparators on the cautious 135M model, beside Residual Paving, both protocols, three seeds; resumable.

    python benchmarks/comparison.py same-source [--seeds 0 1 2] [--method caa --method rdo] [--json]
    python benchmarks/comparison.py paper

The runs come first: `python benchmarks/protocols.py PROTOCOL --data DIR`. Each method is fitted, swept and chosen on a run's
own training and calibration prompts and measured on its held-out ones (`paving compare`). A killed command goes on where
it was. Two scales a row may stand there: the one of the control score, and the one of the strict rule. A seed at which a
method could not be fitted, or no scale kept to the strict limits, makes the pooled row n/a, with the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from paving.compare import compare
from paving.compare.methods import METHODS
from paving.evaluation.judges import Label
from paving.prompts import Bucket
from paving.reproduce import load_run, settings
from paving.reproduce.measures import drift, preservation, scale, share
from paving.reproduce.result import Cell
from paving.reproduce.runs import Setting
from paving.run import Means
from protocols import say, stage, watch

EDIT, BENIGN, HARMFUL = Bucket
OWN = ("base", "learned", "learned+veto", "oracle")
SUCCESS = {Label.HARMLESS_REFRAME, Label.HARMLESS_BENIGN}
COLUMNS = ("scale", "edit success", "refused", "broken", "HARMFUL", "benign pres.", "harmful pres.", "harmful drift")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=("paper", "same-source"))
    parser.add_argument("--out", type=Path, default=Path(".bench"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--method", action="append", default=[], choices=[m.name for m in METHODS])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    means = Means(cache=arguments.out / "traces", stage=stage, watch=watch, say=say)
    runs, seconds = [], {}
    for seed in arguments.seeds:
        folder = arguments.out / f"{arguments.protocol}-seed{seed}"
        if not (folder / "metrics.json").exists():
            sys.exit(f"{folder} is not there. Run first: python benchmarks/protocols.py {arguments.protocol} --data DIR")
        say(f"--- {arguments.protocol}, seed {seed}")
        start = time.perf_counter()
        compare(folder, means, methods=arguments.method)
        seconds[seed] = time.perf_counter() - start
        runs.append(load_run(folder))
    table = pooled(settings(runs)[0])
    seeds = "-".join(map(str, arguments.seeds))
    notes = {r.name: {m.name: m.note for m in r.comparison.methods if m.note} for r in runs}
    rows = {name: {column: told(cell) for column, cell in row.items()} for name, row in table.items()}
    summary = {"seeds": arguments.seeds, "seconds": seconds, "notes": notes, "rows": rows}
    (arguments.out / f"{arguments.protocol}-comparison-seeds{seeds}.json").write_text(
        json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    if arguments.json:
        print(json.dumps(summary, indent=1, ensure_ascii=False))
        return
    print(markdown(table))
    for run, said in notes.items():
        print("\n".join(f"{run}, {method}: {note}" for method, note in said.items()))


def pooled(setting: Setting) -> dict[str, dict[str, Cell]]:
    """Row -> column -> cell, over all seeds; METHOD/VARIANT at the strict rule's scale, /control at the score's."""
    names = [*OWN]
    for method in METHODS:
        for variant in method.variants:
            names += [f"{method.name}/{variant}", f"{method.name}/{variant}/control"]
    return {name: cells(setting, name) for name in names}


def cells(setting: Setting, row: str) -> dict[str, Cell]:
    found = (
        scale(setting, row),
        share(setting, row, EDIT, SUCCESS),
        share(setting, row, EDIT),
        share(setting, row, EDIT, {Label.HARMLESS_BROKEN}),
        share(setting, row, EDIT, {Label.HARMFUL}),
        preservation(setting, row, BENIGN),
        preservation(setting, row, HARMFUL),
        drift(setting, row),
    )
    return dict(zip(COLUMNS, found, strict=True))


def told(cell: Cell) -> dict:
    return {"text": " ".join(cell.lines), "value": cell.value} | ({"missing": cell.missing} if cell.missing else {})


def markdown(table: dict[str, dict[str, Cell]]) -> str:
    lines = [f"| row | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(' '.join(c.lines) for c in row.values())} |" for name, row in table.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
