"""What a DIM direction over all layers and positions costs, against the forward passes that it needs (bar: 1.1).

    python benchmarks/dim_extraction.py [--prompts 64] [--rounds 8] [--batch-size 16] [--threads N] [--json]

Extraction is `position_means` over harmful and benign prompts and the difference of the two; `passes` runs the same batches
through the same blocks and reads nothing. Both in one process, the order alternating, ratios paired by round.

Floors of what reading adds, in the same units as a pass's: operations, one sum over rows for every layer, position and
channel; bytes, the states at those positions once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from paired import machine, machine_line, model_size, ratio_over_rounds, rotated_rounds, synchronise
from paving.backbone import EMBEDDED, Backbone, load_backbone, pad_left, render_ids
from paving.prompts import Bucket, starter_prompts
from paving.steering.directions import position_means, post_instruction_tokens
from paving.steering.states import read_states
from paving.traces.store import chunks


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--prompts", type=int, default=64, help="of either kind, at most")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    report = measure(load_backbone(args.model), args.prompts, args.rounds, args.batch_size)
    print(json.dumps(report, indent=1) if args.json else as_text(report))
    return 0


def measure(backbone: Backbone, n: int, rounds: int, batch_size: int) -> dict:
    sides = [token_rows(backbone, bucket, n) for bucket in (Bucket.HARMFUL_KEEP, Bucket.BENIGN_KEEP)]
    n_positions = post_instruction_tokens([row for rows in sides for row in rows])
    work: dict[str, Callable[[], object]] = {
        "passes": lambda: [passes(backbone, rows, batch_size) for rows in sides],
        "extraction": lambda: extraction(backbone, sides, n_positions, batch_size),
    }
    for run in work.values():  # once unmeasured: the first pass of a process allocates
        run()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for names in rotated_rounds(list(work), rounds):
        for name in names:
            synchronise(backbone.device)
            start = time.perf_counter()
            work[name]()
            synchronise(backbone.device)
            seconds[name].append(time.perf_counter() - start)
    return {
        "machine": machine(backbone),
        "prompts": [len(rows) for rows in sides],
        "layers": backbone.n_layers,
        "positions": n_positions,
        "seconds": {name: min(found) for name, found in seconds.items()},
        "ratio": asdict(ratio_over_rounds(seconds["extraction"], seconds["passes"])),
        "floor": floors(backbone, sides, n_positions, batch_size),
    }


def token_rows(backbone: Backbone, bucket: Bucket, n: int) -> list[list[int]]:
    prompts = [p for p in starter_prompts() if p.bucket is bucket][:n]
    return [render_ids(backbone, p.text) for p in prompts]


def extraction(backbone: Backbone, sides: Sequence[Sequence[Sequence[int]]], n_positions: int, batch_size: int) -> Tensor:
    harmful, benign = (position_means(backbone, rows, n_positions, batch_size=batch_size) for rows in sides)
    return harmful - benign


def passes(backbone: Backbone, rows: Sequence[Sequence[int]], batch_size: int) -> None:
    for chunk in chunks(sorted(rows, key=len), batch_size):
        read_states(backbone, *pad_left(backbone, chunk), (), lambda resid: resid)


def floors(
    backbone: Backbone, sides: Sequence[Sequence[Sequence[int]]], n_positions: int, batch_size: int
) -> dict[str, float]:
    """Ratios to a pass's own operations and bytes, of summing the states that are read."""
    size = model_size(backbone)
    rows = [row for side in sides for row in side]
    tokens = sum(map(len, rows))
    read = len(rows) * size.n_layers * n_positions * size.d_model
    weights = size.linear - size.head  # the blocks alone are run
    batches = sum(-(-len(side) // batch_size) for side in sides)
    return {
        "operations": 1 + read / (2 * weights * tokens),
        "bytes": 1 + read * size.item_bytes / (batches * weights * size.item_bytes),
    }


def as_text(report: dict) -> str:
    ratio, seconds, floor = (report[key] for key in ("ratio", "seconds", "floor"))
    harmful, benign = report["prompts"]
    return (
        f"{machine_line(report['machine'])}\n"
        f"{harmful} + {benign} prompts, {report['layers']} layers x {report['positions']} positions: extraction "
        f"{seconds['extraction']:.2f} s, its passes {seconds['passes']:.2f} s\n"
        f"ratio {ratio['median']:.3f} [{ratio['least']:.3f}, {ratio['greatest']:.3f}] over {ratio['n']} rounds (bar 1.1); "
        f"floors {floor['operations']:.5f} by operations, {floor['bytes']:.3f} by bytes"
    )


if __name__ == "__main__":
    sys.exit(main())
