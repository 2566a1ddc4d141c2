"""Five categories in one checkpoint: what each rule for shared channels refuses, of every category and of benign prompts.

    python benchmarks/circuits.py --data DIR --only selective --seeds 0          # first: the deltas to be composed
    python benchmarks/circuit_composition.py --data DIR [--runs .bench/circuits] [--pairs 50] [--finished] [--json]

Rows are the base, each delta alone, and all of them composed by each rule at each scale (of every category's own α). Prompts
are held out from all the runs that are composed; benign ones are the same for every category. Scales are shown, and none is
chosen by these prompts. Resumable; counts go to --kept, and what stands there is not measured again.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, ConfigDict

from circuits import CATEGORIES, keep, percents
from paving.circuit.compose import compose
from paving.circuit.delta import Delta
from paving.circuit.delta_files import load_delta, weights_sha256
from paving.circuit.overlap import Overlap
from paving.circuit_run.folder import read_circuit_config
from paving.circuit_run.inputs import held_out_sets
from paving.evaluation.refusal_policy import BENIGN, CATEGORY, PolicyRow, PromptSet, policy_row
from paving.evaluation.three_way import Protocol, RowSpec
from paving.intervention import Identity, Intervention
from paving.run import Means
from protocols import say, stage, watch

SCALES = (0.6, 0.8, 1.0)
BASE = "base"


class Kept(BaseModel):
    """deltas: category -> (alpha, hash of its weights). shared: in how many circuits a channel stands -> channels."""

    model_config = ConfigDict(extra="forbid")

    deltas: dict[str, tuple[float, str]]
    pairs: int
    shared: dict[int, int]
    rows: list[PolicyRow]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path(".bench/circuits"))
    parser.add_argument("--out", type=Path, default=Path(".bench/circuit-composition"))
    parser.add_argument("--kept", type=Path, default=Path(__file__).parent / "measured" / "circuit-composition")
    parser.add_argument("--categories", nargs="+", choices=CATEGORIES, default=list(CATEGORIES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=50, help="held-out prompts of a category; benign ones twice as many")
    parser.add_argument("--scales", nargs="+", type=float, default=list(SCALES))
    parser.add_argument("--finished", action="store_true", help="measure nothing")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    path = args.kept / f"seed{args.seed}.json"
    kept = Kept.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None
    if not args.finished:
        kept = measured(args, kept, path)
    if kept is None:
        sys.exit(f"nothing is measured in {path}.")
    print(kept.model_dump_json(indent=1) if args.json else markdown(kept))
    return 0


def measured(args: argparse.Namespace, kept: Kept | None, path: Path) -> Kept:
    folders = {c: args.runs / f"{c}-seed{args.seed}-selective" for c in args.categories}
    deltas = {c: load_delta(folder / "delta") for c, folder in folders.items()}
    held = Counter(c for d in deltas.values() for layer in d.mask.channels.items() for c in product([layer[0]], layer[1]))
    found = Kept(
        deltas={c: (d.alpha, weights_sha256(d)) for c, d in deltas.items()},
        pairs=args.pairs,
        shared=dict(sorted(Counter(held.values()).items())),
        rows=[],
    )
    if kept is not None:
        if kept.model_copy(update={"rows": []}) != found:
            sys.exit(f"{path} was measured on other deltas or prompts; move it away, or give another --kept.")
        found = kept
    todo = [name for name, _, _ in rows(deltas, args.scales) if name not in {row.name for row in found.rows}]
    if not todo:
        return found
    means = Means.default(stage=stage, watch=watch, say=say)
    config = read_circuit_config(folders[args.categories[0]])
    backbone = means.load(config.model, config.dtype)
    sets = unseen_by_all(args, folders)
    protocol = Protocol(config.decoding, means.judge(config.judge))
    base = None
    for name, edit, strength in rows(deltas, args.scales):
        if name not in (BASE, *todo):
            continue
        say(f"--- {name}")
        spec = RowSpec(edit, "edit", "none", strength, f"{found.deltas}/{name}")
        row, labels = policy_row(backbone, spec, sets, protocol, args.out / slug(name), means.stage, base=base)
        base = base or labels
        if name in todo:
            found.rows.append(row.model_copy(update={"name": name}))
        keep(found, path)
    return found


def rows(deltas: Mapping[str, Delta], scales: Sequence[float]) -> Iterator[tuple[str, Intervention, float | None]]:
    yield BASE, Identity(), None
    for category, delta in deltas.items():
        yield f"{category} alone", delta.edit(), delta.alpha
    for overlap, scale in product(get_args(Overlap), scales):
        yield f"all, {overlap}, at {scale:g}", compose(list(deltas.values()), overlap=overlap).edit(scale), scale


def unseen_by_all(args: argparse.Namespace, folders: Mapping[str, Path]) -> list[PromptSet]:
    """Held-out prompts of every category that no run has seen, and benign ones."""
    found: dict[str, PromptSet] = {}
    for folder in folders.values():
        changes = {
            "held_out": str(args.data / "cast_categories_test.jsonl"),
            "pairs": str(args.data / "cast_categories_train.jsonl"),
        }
        config = read_circuit_config(folder).model_copy(
            update=changes | {"held_out_limit": 2 * args.pairs, "others_limit": args.pairs}
        )
        for s in held_out_sets(config, {})[0]:
            known = found.get(s.name)
            ids = {p.id for p in s.prompts}
            found[s.name] = s if known is None else replace(known, prompts=[p for p in known.prompts if p.id in ids])
    sides = {name: BENIGN if name == BENIGN else CATEGORY for name in (*folders, BENIGN)}
    return [
        replace(found[name], side=side, prompts=found[name].prompts[: args.pairs * (1 + (side == BENIGN))])
        for name, side in sides.items()
    ]


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() or c in "._" else " " for c in name).split())


def markdown(kept: Kept) -> str:
    names = list(kept.rows[0].sets)
    lines = [f"| refused % | {' | '.join(names)} | benign broken % |", "| --- |" + " --- |" * (len(names) + 1)]
    for row in kept.rows:
        rates = [row.sets[name].refused for name in names] + [row.sets[BENIGN].broken]
        cells = (f"{percents(r.rate)} [{percents(r.low)}, {percents(r.high)}]" for r in rates)
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    total = sum(kept.shared.values())
    shares = ", ".join(f"{n} circuit{'s' if n > 1 else ''}: {k} ({percents(k / total)} %)" for n, k in kept.shared.items())
    return "\n".join([*lines, "", f"Channels by how many circuits hold them: {shares}."])


if __name__ == "__main__":
    sys.exit(main())
