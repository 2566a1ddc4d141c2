"""A tiny run, trained and evaluated in as many processes as a launcher starts: `two_processes.py FOLDER OUT [STAGE]`.

FOLDER holds the files of `tiny_run` and gets the run; OUT.RANK what a process found. STAGE: where the last process dies.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from paving.processes import rank_and_world, together
from paving.run import evaluate, train
from tiny_runs import WordJudge, tiny_config


def main(folder: Path, out: Path, dies_at: str | None = None) -> None:
    config, means = tiny_config(folder)

    def watch(stage: str, *_rest) -> None:
        rank, world = rank_and_world()
        if stage == dies_at and rank == world - 1:
            os._exit(9)

    means = replace(means, watch=watch)
    with together(folder / "run", means.cache) as mine:
        train(config, mine, means, judge=WordJudge())
        metrics = evaluate(mine, means, judge=WordJudge())
        rank, world = rank_and_world()
        weights = load_file(mine / "controller" / "controller.safetensors")
        found = {
            "world": world,
            "history": json.loads((mine / "training" / "history.json").read_text(encoding="utf-8")),
            "metrics": json.loads(metrics.model_dump_json()),
            "weights": {name: tensor.flatten().tolist() for name, tensor in weights.items()},
            "verdicts": sorted(path.name for path in mine.glob("verdicts/*")),
        }
        out.with_suffix(f".{rank}").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
