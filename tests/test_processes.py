"""Two processes come to what one comes to: losses, weights, metrics; and only the first one writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paving.processes import agreed, from_first, gathered, once, shared, sum_gradients, summed, together
from tiny_runs import tiny_run

TESTS = Path(__file__).parent


def run(folder: Path, n: int, dies_at: str | None = None) -> list[dict]:
    """What every process found; nothing where one is to die in a stage."""
    if not folder.exists():
        folder.mkdir()
        tiny_run(folder)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    line = [*launcher, str(TESTS / "two_processes.py"), str(folder), str(folder / "found.json"), *filter(None, [dies_at])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=300)
    if dies_at is not None:
        assert done.returncode != 0
        return []
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"found.{rank}").read_text(encoding="utf-8")) for rank in range(n)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return run(folder / "one", 1), run(folder / "two", 2)


def test_two_processes_find_the_losses_and_weights_of_one(found):
    ((one,), (first, second)) = found
    assert (one["world"], first["world"]) == (1, 2)
    assert [(r["stage"], r["epoch"]) for r in one["history"]] == [(r["stage"], r["epoch"]) for r in first["history"]]
    for a, b in zip(one["history"], first["history"], strict=True):
        assert b["losses"] == pytest.approx(a["losses"], rel=1e-4, abs=1e-6)
    for name, values in one["weights"].items():
        assert first["weights"][name] == pytest.approx(values, rel=1e-3, abs=1e-4), name
    assert second["weights"] == first["weights"]  # to the last bit


def test_a_run_that_two_processes_began_is_ended_by_one(found, tmp_path):
    ((one,), _) = found
    run(tmp_path / "run", 2, dies_at="stage 2")
    assert not (tmp_path / "run" / "run" / "controller").exists()
    (ended,) = run(tmp_path / "run", 1)
    assert [r["stage"] for r in ended["history"]] == [r["stage"] for r in one["history"]]
    for name, values in one["weights"].items():
        assert ended["weights"][name] == pytest.approx(values, rel=1e-3, abs=1e-4), name


def test_two_processes_measure_what_one_measures(found):
    ((one,), (first, second)) = found
    mine, theirs = (f["metrics"] | {"training": None} for f in (first, second))  # but for the seconds it took
    assert mine == theirs
    for a, b in zip(one["metrics"]["rows"], first["metrics"]["rows"], strict=True):
        assert (a["name"], a["refusal"]) == (b["name"], b["refusal"])
        for bucket, score in a["preservation"].items():
            assert b["preservation"][bucket]["value"] == pytest.approx(score["value"], abs=1e-4)


def test_the_first_process_alone_writes_and_asks_the_judge(found):
    _, (first, second) = found
    assert first["verdicts"] and not second["verdicts"]


def test_a_process_by_itself_does_nothing_of_it(tmp_path):
    assert list(shared([1, 2, 3])) == gathered([1, 2, 3]) == [1, 2, 3]
    assert (agreed("x"), once(lambda: 2), summed([1.0])) == ("x", 2, [1.0])
    parameter = torch.nn.Parameter(torch.ones(2))
    sum_gradients([parameter])
    from_first([parameter])
    assert parameter.grad is None
    with together(tmp_path / "run", tmp_path / "cache") as mine:
        assert mine == tmp_path / "run" and not mine.exists() and not (tmp_path / "cache").exists()
