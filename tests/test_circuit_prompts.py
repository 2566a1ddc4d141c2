"""Which prompts a circuit run asks: benign ones that are no side of a pair, and held-out pairs that are given later."""

from __future__ import annotations

import json

import pytest

from paving.backbone import render_ids
from paving.circuit_run import edit, evaluate, find
from paving.circuit_run.fitting import recipe_key
from paving.circuit_run.inputs import also_benign, own_answers, pairs_of
from paving.generation import load_completions
from paving.prompts.types import Bucket
from paving.run import Means
from paving.run_folder import RunError
from paving.traces.store import TraceStore
from tiny_circuit_runs import WordJudge, run_whole, tiny_circuit, write_circuit_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_circuit_files(tmp_path_factory.mktemp("also"))


@pytest.fixture
def means(tmp_path):
    return Means.default(cache=tmp_path / "cache")


@pytest.fixture
def also(tmp_path):
    """Ten prompts in five groups."""
    path = tmp_path / "also.jsonl"
    rows = [{"id": f"a{i}", "prompt": f"w{40 + i} w7 w{i}", "focus": f"g{i % 5}"} for i in range(10)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def test_a_group_trains_or_chooses_alpha_and_the_package_brings_some(files, also):
    train, calibration = also_benign(tiny_circuit(files, also_benign=str(also)))
    assert (len(train), len(calibration)) == (8, 2)
    assert not {p.group for p in train} & {p.group for p in calibration}
    assert {p.bucket for p in (*train, *calibration)} == {Bucket.BENIGN_KEEP}
    other = also_benign(tiny_circuit(files, also_benign=str(also), seed=1))
    assert {p.id for p in other[1]} != {p.id for p in calibration} or {p.id for p in other[0]} != {p.id for p in train}
    starter = also_benign(tiny_circuit(files, also_benign="starter"))
    assert sum(map(len, starter)) == 156 and len(starter[1]) >= 20
    assert also_benign(tiny_circuit(files)) == ((), ())


def test_they_are_retained_counted_and_kept_out_of_what_is_held_out(files, also, tmp_path, means):
    folder, held_out = tmp_path / "run", tmp_path / "benign.jsonl"
    known = json.loads(also.read_text(encoding="utf-8").splitlines()[0])["prompt"]
    held_out.write_text(
        "".join(json.dumps({"prompt": t}) + "\n" for t in (known.upper(), "w90 w3", "w91 w5")), encoding="utf-8"
    )
    run_whole(files, folder, means, also_benign=str(also))
    train, calibration = also_benign(tiny_circuit(files, also_benign=str(also)))
    retained = {a.id for a in load_completions(folder / "own_answers.jsonl")}
    assert {p.id for p in train} <= retained and not {p.id for p in calibration} & retained
    points = json.loads((folder / "strengths.json").read_text(encoding="utf-8"))["points"]
    assert {p["n_benign"] for p in points} == {4 + len(calibration)} and {p["n_harmful"] for p in points} == {4}
    metrics = evaluate(folder, means, ood_benign=[str(held_out)], judge=WordJudge())
    assert metrics.rows[1].sets["benign-benign"].refused.n == 2 and metrics.left_out == 1
    recipe = json.loads((folder / "delta" / "delta.json").read_text(encoding="utf-8"))["components"][0]["recipe"]
    assert recipe["also_benign"] == "also.jsonl"


def test_a_text_stands_on_one_side_alone_and_none_that_a_pair_has(files, tmp_path):
    pair = json.loads((files / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    texts = [pair["base"].upper(), pair["harm"], *(["w60 w61 w62 w63 w64"] * 4), *(f"w{70 + i} w3 w{i}" for i in range(6))]
    path = tmp_path / "repeated.jsonl"
    path.write_text("".join(json.dumps({"id": f"r{i}", "prompt": t}) + "\n" for i, t in enumerate(texts)), encoding="utf-8")
    for seed in range(4):
        found = [p.text for side in also_benign(tiny_circuit(files, also_benign=str(path), seed=seed)) for p in side]
        assert len(found) == len(set(found)) == 7 and not {pair["base"].upper(), pair["harm"]} & set(found)


def test_what_is_retained_is_asked_behind_its_own_system_prompt(files, also, tmp_path, means):
    rows = [json.loads(line) | {"system": "w150 w151"} for line in also.read_text(encoding="utf-8").splitlines()]
    also.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    config = tiny_circuit(files, also_benign=str(also))
    backbone = means.load(config.model, config.dtype)
    train, _ = pairs_of(config)
    (tmp_path / "run").mkdir()
    found = {tuple(e.prompt) for e in own_answers(backbone, config, train, tmp_path / "run", means)}
    wanted = {tuple(render_ids(backbone, p.text, system="w150 w151")) for p in also_benign(config)[0]}
    assert found & wanted and not found & {tuple(render_ids(backbone, p.text)) for p in also_benign(config)[0]}


def test_the_names_of_finished_rows_are_those_of_before_the_option(files, also):
    config = tiny_circuit(files)
    assert recipe_key(config, "random", 0.5) != recipe_key(tiny_circuit(files, also_benign=str(also)), "random", 0.5)
    settings = config.model_dump(mode="json")
    del settings["also_benign"]
    assert recipe_key(config, "random", 0.5) == TraceStore.key(config=settings, row="random", strength=0.5)


def test_what_changes_under_a_run_or_is_too_little_is_refused(files, also, tmp_path, means):
    folder = tmp_path / "run"
    find(tiny_circuit(files, also_benign=str(also)), folder, means)
    kept = also.read_text(encoding="utf-8")
    also.write_text(kept.replace("w7", "w8"), encoding="utf-8")
    with pytest.raises(RunError, match=r"also\.jsonl has changed since"):
        edit(folder, means, judge=WordJudge())
    also.write_text(kept.splitlines()[0] + "\n", encoding="utf-8")
    with pytest.raises(RunError, match="holds 1 groups of prompts"):
        find(tiny_circuit(files, also_benign=str(also)), tmp_path / "other", means)
    assert not (tmp_path / "other").exists()


def test_a_run_that_was_begun_without_held_out_pairs_is_given_some_later(files, tmp_path, means):
    folder, test = tmp_path / "run", str(files / "test.jsonl")
    run_whole(files, folder, means, held_out=None)
    first = evaluate(folder, means, held_out=test, judge=WordJudge())
    assert evaluate(folder, means, judge=WordJudge()).rows == first.rows  # remembered
    run_whole(files, tmp_path / "with", means)
    assert evaluate(tmp_path / "with", means, judge=WordJudge()).rows == first.rows  # they decide nothing that was trained
    with pytest.raises(RunError, match="was begun with the held-out pairs"):
        evaluate(tmp_path / "with", means, held_out=str(files / "train.jsonl"), judge=WordJudge())
