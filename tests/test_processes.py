"""Two processes come to what one comes to: losses, weights, metrics; and only the first one writes."""

from __future__ import annotations

import json
import os
import socket
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
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    (done,) = finished([begun(folder, launcher, *filter(None, [dies_at]))])
    if dies_at is not None:
        assert done[0] != 0
        return []
    assert done[0] == 0, done[1]
    return [json.loads((folder / f"found.{rank}").read_text(encoding="utf-8")) for rank in range(n)]


def begun(folder: Path, launcher: list[str], *more: str) -> subprocess.Popen:
    if not folder.exists():
        folder.mkdir()
        tiny_run(folder)
    line = [*launcher, str(TESTS / "two_processes.py"), str(folder), str(folder / "found.json"), *more]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished(launched: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """(exit code, the end of what it said) of each."""
    try:
        said = [process.communicate(timeout=300)[1][-3000:] for process in launched]
    finally:
        for process in launched:
            process.kill()
    return [(process.returncode, text) for process, text in zip(launched, said, strict=True)]


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


def test_accelerate_launches_them_too(found, tmp_path):
    _, (first, _) = found
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    (done,) = finished([begun(tmp_path / "run", launcher)])
    assert done[0] == 0, done[1]
    other = json.loads((tmp_path / "run" / "found.0").read_text(encoding="utf-8"))
    assert other["world"] == 2 and other["weights"] == first["weights"]


def test_two_nodes_of_one_process_each_are_two_processes(found, tmp_path):
    _, (first, _) = found
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    nodes = []
    for rank in range(2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        launcher += ["--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", str(port)]
        nodes.append(begun(tmp_path / "run", launcher))
    assert [code for code, _ in finished(nodes)] == [0, 0]
    other = json.loads((tmp_path / "run" / "found.0").read_text(encoding="utf-8"))
    assert other["world"] == 2 and other["weights"] == first["weights"]


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
