"""A tiny run, trained and evaluated in as many processes as a launcher starts: `two_processes.py FOLDER OUT`.

FOLDER holds the files of `tiny_run` and gets the run; OUT the first process's history, metrics and weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import load_file

from paving.processes import rank_and_world, together
from paving.run import evaluate, train
from tiny_runs import WordJudge, tiny_config


def main(folder: Path, out: Path) -> None:
    config, means = tiny_config(folder)
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
    main(Path(sys.argv[1]), Path(sys.argv[2]))
