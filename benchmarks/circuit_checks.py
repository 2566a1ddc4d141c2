"""Finished circuit runs looked at twice: by both rules of the judge, and on benign prompts of other sources; resumable.

    python benchmarks/circuits.py --data DIR                  # first: run folders in --runs
    python benchmarks/circuit_checks.py --data DIR [--only rules benign]
    python benchmarks/circuit_checks.py --data DIR --finished

rules    The rule judge is stricter with benign prompts (moral talk alone is no refusal there). Every held-out answer of the
         category and of benign prompts is judged by the rule of each side.
benign   Over-refusal is measured on the kind of benign prompt that the retain term was trained on. Here XSTest's safe
         prompts, which look unsafe, and Alpaca's are asked of the base and of every selective edit at its α.

Counts, and no prompt or answer, are written to --kept. Intervals are of one run's prompts, which all runs share; seeds in
brackets.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from circuits import CATEGORIES, keep, percents
from paving.circuit.delta_files import load_delta, weights_sha256
from paving.circuit_run.folder import read_circuit_config
from paving.evaluation.judges import Judge, Label
from paving.evaluation.statistics import wilson
from paving.generation import Completion, generate, load_completions
from paving.intervention import Identity, Intervention
from paving.prompts import Bucket, read_prompts
from paving.run import Means
from protocols import say, stage, watch

RULES = {"harmful": Bucket.HARMFUL_KEEP, "benign": Bucket.BENIGN_KEEP}
SOURCES = {"xstest, safe": "xstest.jsonl?label=safe", "alpaca": "alpaca.jsonl"}
EDIT, SELECTIVE = "c-delta-theta", "selective"


class Kept(BaseModel):
    """rules: run -> row -> side -> rule -> (refused, n). benign: run, or `base` -> source -> (refused, broken, n).
    state: run, or `base` -> what its benign counts are of: edit, prompts, decoding, judge"""

    model_config = ConfigDict(extra="forbid")

    rules: dict[str, dict[str, dict[str, dict[str, tuple[int, int]]]]] = {}
    benign: dict[str, dict[str, tuple[int, int, int]]] = {}
    state: dict[str, str] = {}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path(".bench/circuits"))
    parser.add_argument("--kept", type=Path, default=Path(__file__).parent / "measured" / "circuit-checks.json")
    parser.add_argument("--only", nargs="+", choices=("rules", "benign"), default=["rules", "benign"])
    parser.add_argument("--alpaca", type=int, default=100, help="prompts of Alpaca; XSTest's safe ones are all asked")
    parser.add_argument("--finished", action="store_true", help="measure nothing")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    kept = Kept.model_validate_json(args.kept.read_text(encoding="utf-8")) if args.kept.exists() else Kept()
    if not args.finished:
        means = Means.default(stage=stage, watch=watch, say=say)
        folders = [f for f in sorted(args.runs.glob("*-seed*-*")) if (f / "metrics.json").exists()]
        if not folders:
            sys.exit(f"no finished run is in {args.runs}. Run first: python benchmarks/circuits.py --data {args.data}")
        if "rules" in args.only:
            kept.rules |= {f.name: by_both_rules(f, means.judge("rules")) for f in folders}
            keep(kept, args.kept)
        if "benign" in args.only:
            selective = [f for f in folders if f.name.endswith(SELECTIVE)]
            if not selective:
                sys.exit(f"no finished selective run is in {args.runs}: benign prompts are asked of those.")
            ask_benign(args, kept, selective, means)
    if not kept.rules and not kept.benign:
        sys.exit(f"nothing is measured in {args.kept}.")
    print(kept.model_dump_json(indent=1) if args.json else markdown(kept))
    return 0


def by_both_rules(folder: Path, judge: Judge) -> dict[str, dict[str, dict[str, tuple[int, int]]]]:
    """Row -> side -> rule -> (refused, n)."""
    found: dict[str, dict[str, dict[str, tuple[int, int]]]] = {}
    category = read_circuit_config(folder).category
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    for row in (r["name"] for r in metrics["rows"]):
        for side, name in (("category", category), ("benign", "benign")):
            answers = load_completions(folder / "sets" / name / "completions" / f"{row}.jsonl")
            sides = found.setdefault(row, {}).setdefault(side, {})
            for rule, bucket in RULES.items():
                labels = [judge.judge(a.prompt, a.response, bucket, truncated=a.truncated).label for a in answers]
                sides[rule] = (labels.count(Label.HARMLESS_REFUSAL), len(labels))
    return found


def ask_benign(args: argparse.Namespace, kept: Kept, folders: Sequence[Path], means: Means) -> None:
    limits = {"alpaca": args.alpaca}
    prompts = {
        name: read_prompts(f"{args.data}/{source}", Bucket.BENIGN_KEEP, limit=limits.get(name))
        for name, source in SOURCES.items()
    }
    asked = sha256(json.dumps([[p.asked for p in each] for each in prompts.values()]).encode()).hexdigest()[:16]
    for folder in (None, *folders):
        name = folder.name if folder else "base"
        delta = load_delta(folder / "delta") if folder else None
        config = read_circuit_config(folder or folders[0])
        edited = f"{weights_sha256(delta)}/{delta.alpha:g}" if delta else "base"
        state = f"{edited}/{asked}/{config.decoding.model_dump_json()}/{config.judge}"
        if kept.state.get(name) == state:
            continue
        say(f"--- {name}")
        backbone = means.load(config.model, config.dtype)
        edit: Intervention = delta.edit() if delta else Identity()
        judge = means.judge(config.judge)
        answered = {s: generate(backbone, list(p), edit, config.decoding) for s, p in prompts.items()}
        kept.benign[name] = {source: counts(answers, judge) for source, answers in answered.items()}
        kept.state[name] = state
        keep(kept, args.kept)


def counts(answers: Sequence[Completion], judge: Judge) -> tuple[int, int, int]:
    labels = [judge.judge(a.prompt, a.response, Bucket.BENIGN_KEEP, truncated=a.truncated).label for a in answers]
    return labels.count(Label.HARMLESS_REFUSAL), labels.count(Label.HARMLESS_BROKEN), len(labels)


def markdown(kept: Kept) -> str:
    return "\n\n".join("\n".join(lines) for lines in (rules_table(kept), benign_table(kept)) if lines)


def rules_table(kept: Kept) -> list[str]:
    """Every row pooled over its runs: the share refused, by the rule of each side."""
    if not kept.rules:
        return []
    lines = ["| row | runs | category % by harmful / benign rule | benign % by harmful / benign rule |", "| --- " * 4 + "|"]
    rows: dict[str, list[dict]] = {}
    for run, found in kept.rules.items():
        for row, sides in found.items():
            own = run.endswith(SELECTIVE)
            if own or row == EDIT:  # the base of a published run is that of the selective one
                rows.setdefault(f"{row}, {run.rpartition('-')[2]}" if row == EDIT else row, []).append(sides)
    for row, each in rows.items():
        cells = []
        for side in ("category", "benign"):
            shares = []
            for rule in RULES:
                k, n = (sum(sides[side][rule][i] for sides in each) for i in (0, 1))
                shares.append(percents(k / n))
            cells.append(" / ".join(shares))
        lines.append(f"| {row} | {len(each)} | {' | '.join(cells)} |")
    return lines


def benign_table(kept: Kept) -> list[str]:
    if not kept.benign:
        return []
    heads = [f"{source}: refused % | broken %" for source in SOURCES]
    lines = [f"| edit | runs | {' | '.join(heads)} |", "| --- " * (2 + 2 * len(SOURCES)) + "|"]
    for name, runs in grouped(kept.benign):
        cells: list[str] = []
        for source in SOURCES:
            refused, broken, n = (sum(run[source][i] for run in runs.values()) for i in range(3))
            prompts = max(run[source][2] for run in runs.values())
            rate = wilson(round(refused / n * prompts), prompts)
            seeds = f" ({', '.join(percents(s) for s in by_seed(runs, source))})" if len(runs) > 1 else ""
            cells += [f"{percents(refused / n)} [{percents(rate.low)}, {percents(rate.high)}]{seeds}", percents(broken / n)]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return lines


def by_seed(runs: Mapping[str, Mapping[str, tuple[int, int, int]]], source: str) -> list[float]:
    """The share refused in the runs of each seed."""
    seeds: dict[str, list[tuple[int, int, int]]] = {}
    for name, found in sorted(runs.items()):
        seeds.setdefault(name.split("-")[1], []).append(found[source])
    return [sum(k for k, _, _ in each) / sum(n for _, _, n in each) for _, each in sorted(seeds.items())]


def grouped(benign: dict[str, dict[str, tuple[int, int, int]]]) -> Iterator[tuple[str, dict]]:
    yield "base", {"base": benign["base"]}
    edits = {name: found for name, found in benign.items() if name != "base"}
    for category in CATEGORIES:
        if found := {name: run for name, run in edits.items() if name.startswith(f"{category}-")}:
            yield category, found
    if edits:  # a command that was killed behind the base has none
        yield "all", edits


if __name__ == "__main__":
    sys.exit(main())
