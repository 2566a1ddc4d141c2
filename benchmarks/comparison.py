"""Comparators on the cautious 135M model, beside Residual Paving, both protocols, three seeds; resumable.

    python benchmarks/comparison.py same-source [--seeds 0 1 2] [--method caa --method rdo] [--json]
    python benchmarks/comparison.py paper
    python benchmarks/comparison.py paper --finished [--rule strict/three] [--brief] [--picture PNG]

The runs come first: `python benchmarks/protocols.py PROTOCOL --data DIR`. Each method is fitted, swept and chosen on a run's
own training and calibration prompts and measured on its held-out ones (`paving compare`), for two objectives and for three.
A killed command goes on where it was. What a seed found is kept in --kept, without prompt or answer: figures, and every
answer's label by its prompt's id. Rows: METHOD/VARIANT/RULE/OBJECTIVES, at the scale that the rule takes for so many
objectives, `residual-paving` among them; a row NAME: VARIANT/RULE/OBJECTIVES is a capacity control of table 14, or Residual
Paving fitted without harmful keeps (`two-objectives`, table 9), where `benchmarks/ablations.py` has trained it. A row is
pooled over the seeds that have it, and says how many do. Comparators are fitted once, for both objectives: two leave the
harmful term out of the rule, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from comparison_picture import draw_pooled
from comparison_tables import BRIEF, OWN_ROWS, RULES, control_rows, markdown, of_rule, pooled, told
from paving.compare import compare
from paving.compare.methods import METHODS
from paving.evaluation.comparison import OWN, Comparison
from paving.evaluation.judges import Label
from paving.evaluation.results import Metrics
from paving.reproduce import load_run, settings
from paving.reproduce.runs import Run, Setting
from paving.run import Means
from paving.run_folder import RunConfig
from protocols import say, stage, watch

LETTERS = dict(zip(Label, "HXRFB", strict=True))  # of a label in a kept row
CONTROLS = ("low-rank", "single-expert", "no-trajectory", "two-objectives")


class Kept(BaseModel):
    """One seed. ids: bucket -> held-out prompts; labels: row -> bucket -> a letter a prompt, in their order."""

    model_config = ConfigDict(extra="forbid")

    config: RunConfig
    fingerprint: str
    metrics: Metrics
    comparison: Comparison
    groups: dict[str, str]
    ids: dict[str, list[str]]
    labels: dict[str, dict[str, str]]
    seconds: float


class KeptRun(Run):
    """A run whose answers' labels were kept; there is no folder behind it."""

    kept: Kept

    def verdicts(self, row: str) -> dict[str, dict[str, Label]] | None:
        found = self.kept.labels.get(row)
        names = {letter: label for label, letter in LETTERS.items()}
        return found and {
            bucket: dict(zip(self.kept.ids[bucket], map(names.__getitem__, letters), strict=True))
            for bucket, letters in found.items()
        }

    @property
    def groups(self) -> dict[str, str]:
        return self.kept.groups


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=("paper", "same-source"))
    parser.add_argument("--out", type=Path, default=Path(".bench"))
    parser.add_argument("--kept", type=Path, default=Path(__file__).parent / "measured" / "comparison")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--method", action="append", default=[], choices=[m.name for m in METHODS])
    parser.add_argument("--bert-score", default=None, metavar="MODEL", help="encoder for BERTScore")
    parser.add_argument("--finished", action="store_true", help="measure nothing")
    parser.add_argument("--rule", choices=RULES, help="the rows of this rule alone, and the run's own")
    parser.add_argument("--brief", action="store_true", help="the columns that decide; leaves the benign ones out")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw edit success against drift, all seeds pooled")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    folders = {seed: arguments.out / f"{arguments.protocol}-seed{seed}" for seed in arguments.seeds}
    absent = [f for f in folders.values() if not (f / "metrics.json").exists()]
    if absent and not arguments.finished:  # all of them before the first hour is spent
        sys.exit(f"{absent[0]} is not there. Run first: python benchmarks/protocols.py {arguments.protocol} --data DIR")
    if not arguments.finished:
        one_setting([load_run(folder) for folder in folders.values()])  # before the first hour is spent, too
    for seed, folder in {} if arguments.finished else folders.items():
        say(f"--- {arguments.protocol}, seed {seed}")
        measure(folder, folder.name, arguments, methods=arguments.method)
        for control, trained in controls(arguments.out, folder):
            say(f"--- {arguments.protocol}, seed {seed}: {control}")
            measure(trained, f"{folder.name}-{control}", arguments, methods=(OWN,))
    runs = kept_runs(arguments.kept, [f.name for f in folders.values()])
    if not runs:
        sys.exit(f"nothing is measured in {arguments.kept} for {arguments.protocol} and seeds {arguments.seeds}.")
    table = pooled(one_setting(runs))
    for name in CONTROLS:
        if trained := kept_runs(arguments.kept, [f"{f.name}-{name}" for f in folders.values()]):
            table |= control_rows(name, one_setting(trained))
    if arguments.rule:
        table = {
            name.removesuffix(f"/{arguments.rule}"): row for name, row in table.items() if of_rule(name, arguments.rule)
        }
    if arguments.brief:
        table = {name: {column: row[column] for column in BRIEF} for name, row in table.items()}
    if arguments.picture:
        draw_pooled(one_setting(runs), arguments.picture)
    if not arguments.json:
        print(markdown(table))
        for run in runs:
            print(f"\n{run.name}: {run.kept.seconds / 60:.0f} minutes")
            print("\n".join(f"{run.name}, {m.name}: {m.failed or m.note}" for m in run.comparison.methods))
        return
    rows = {name: {column: told(cell) for column, cell in row.items()} for name, row in table.items()}
    notes = {r.name: {m.name: m.failed or m.note for m in r.comparison.methods} for r in runs}
    summary = {
        "seeds": [r.seed for r in runs],
        "seconds": {r.name: r.kept.seconds for r in runs},
        "notes": notes,
        "rows": rows,
    }
    print(json.dumps(summary, indent=1, ensure_ascii=False))


def measure(folder: Path, name: str, arguments: argparse.Namespace, methods: Sequence[str]) -> None:
    clock = Clock(folder / "comparison" / "seconds.jsonl")
    means = Means(cache=arguments.out / "traces", stage=clock.stage, watch=watch, say=say)
    compare(folder, means, methods=methods, objectives=("two", "three"), bert_model=arguments.bert_score)
    clock.note("done")
    keep(kept_of(load_run(folder), clock.total()), arguments.kept / f"{name}.json")


def controls(out: Path, folder: Path) -> list[tuple[str, Path]]:
    """The capacity controls of a run that are trained and evaluated."""
    trained = [(name, out / "ablations" / folder.name / name) for name in CONTROLS]
    return [(name, place) for name, place in trained if (place / "metrics.json").exists()]


def one_setting(runs: Sequence[Run]) -> Setting:
    """Stops where they are no seeds of one."""
    found = settings(runs)
    if len(found) > 1:
        sys.exit(f"the seeds are no seeds of one setting: {'; '.join(s.name for s in found)}. Measure all on one base.")
    return found[0]


class Clock:
    """Seconds of all processes that worked on a comparison, also of those that were killed: noted at every stage."""

    def __init__(self, path: Path):
        self.path, self.start, self.name = path, time.perf_counter(), f"{os.getpid()}-{time.time()}"

    def stage(self, what: str, total: int) -> Callable[[int], None]:
        self.note(what)
        return stage(what, total)

    def note(self, what: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:  # the line before may have been cut off by a kill
            file.write(
                "\n" + json.dumps({"process": self.name, "at": time.perf_counter() - self.start, "what": what}) + "\n"
            )

    def total(self) -> float:
        last: dict[str, float] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                noted = json.loads(line)
            except ValueError:  # blank, or cut off
                continue
            last[noted["process"]] = max(noted["at"], last.get(noted["process"], 0.0))
        return sum(last.values())


# --- what is kept ---------------------------------------------------------------------------------------------------


def kept_of(run: Run, seconds: float) -> Kept:
    rows = [*(r for r in OWN_ROWS if run.row(r)), *compared_rows(run)]
    verdicts = {row: run.verdicts(row) for row in rows}
    ids = {bucket: list(labels) for bucket, labels in verdicts["base"].items()}
    return Kept(
        config=portable(run.config),
        fingerprint=run.fingerprint,
        metrics=run.metrics.model_copy(update={"model": Path(run.metrics.model).name}),
        comparison=run.comparison.model_copy(update={"model": Path(run.comparison.model).name}),
        groups={i: run.groups.get(i, i) for each in ids.values() for i in each},
        ids=ids,
        labels={
            row: {bucket: "".join(LETTERS[labels[bucket][i]] for i in ids[bucket]) for bucket in ids}
            for row, labels in verdicts.items()
        },
        seconds=seconds,
    )


def portable(config: RunConfig) -> RunConfig:
    """The same on every machine: where base and data lie is no part of what was measured."""
    named = ("model", "edit", "benign", "harmful", "targets_from")
    paths = {name: Path(value).name for name in named if (value := getattr(config, name)) is not None}
    return config.model_copy(update=paths)


def keep(found: Kept, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(found.model_dump_json() + "\n", encoding="utf-8")
    partial.replace(path)


def kept_run(path: Path) -> KeptRun:
    kept = Kept.model_validate_json(path.read_text(encoding="utf-8"))
    run = KeptRun(path.with_suffix(""), kept.config, kept.metrics, None, None, None, kept.fingerprint, kept.comparison)
    object.__setattr__(run, "kept", kept)
    return run


def kept_runs(kept: Path, names: Sequence[str]) -> list[KeptRun]:
    return [kept_run(path) for name in names if (path := kept / f"{name}.json").exists()]


def compared_rows(run: Run) -> list[str]:
    """METHOD/VARIANT/RULE/OBJECTIVE of every choice that found a scale."""
    return [f"{c.method}/{c.variant}/{c.rule}/{c.objective}" for c in run.comparison.choices if c.scale is not None]


if __name__ == "__main__":
    main()
