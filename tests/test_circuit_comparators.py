"""Comparators of a circuit run: trained once, on as many channels, with settings of their own."""

from __future__ import annotations

import shutil

import pytest

from paving.circuit_run import edit, evaluate, find, trained
from paving.run import Means
from paving.run_folder import RunError
from paving.steering.weight_steering import WeightSteeringConfig
from paving.training import strength
from tiny_circuit_runs import WordJudge, run_whole, tiny_circuit, write_circuit_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_circuit_files(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def means(tmp_path):
    return Means.default(cache=tmp_path / "cache")


def test_a_comparator_is_trained_once_whenever_it_is_stopped_and_whatever_is_asked_of_it_later(
    files, tmp_path, means, monkeypatch
):
    folder = tmp_path / "run"
    run_whole(files, folder, means)
    original, asked = strength.generate, []

    def stopped(*args):
        asked.append(1)
        if len(asked) == 2:  # the first strength is measured by then
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(strength, "generate", stopped)
        evaluate(folder, means, against=["random", "ws"], judge=WordJudge())
    monkeypatch.setattr(trained, "weight_delta", lambda *_a, **_k: pytest.fail("trained again"))
    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(strength, "generate", lambda *args: asked.append(1) or original(*args))
        found = evaluate(folder, means, against=["random", "ws"], judge=WordJudge())
    points = len(found.frontier["random"]) - 1 + len(found.frontier["ws"]) - 1  # the base's is the edit's
    assert len(asked) == points - 1 and not list(folder.rglob("*.partial*"))
    monkeypatch.setattr("paving.circuit_run.rows.fit_weight_steering", lambda *_a, **_k: pytest.fail("trained again"))
    source = files / "further.jsonl"
    source.write_text('{"id": "f", "prompt": "w101 w102 w3"}\n', encoding="utf-8")
    later = evaluate(folder, means, ood=[str(source)], judge=WordJudge())
    assert all("further" in row.sets for row in later.rows) and [r.name for r in later.rows] == [r.name for r in found.rows]


def test_slices_of_other_channels_are_not_put_on_these(files, tmp_path, means):
    folder = tmp_path / "run"
    run_whole(files, folder, means)
    evaluate(folder, means, against=["random"], judge=WordJudge())
    shutil.copy(folder / "slices.safetensors", folder / "comparators" / "random.safetensors")  # as many, elsewhere
    source = files / "one_more.jsonl"
    source.write_text('{"id": "g", "prompt": "w103 w104 w5"}\n', encoding="utf-8")
    with pytest.raises(RunError, match=r"random\.safetensors was trained on other channels"):
        evaluate(folder, means, ood=[str(source)], judge=WordJudge())


def test_comparators_of_a_global_circuit_within_edges_are_of_its_size(files, tmp_path, means, monkeypatch):
    folder, sizes = tmp_path / "run", []
    config = {"edges": 12, "edge_pairs": 2, "scope": "global", "fraction": 0.02}
    circuit = find(tiny_circuit(files, **config), folder, means)
    assert set(circuit.channels) < set(trained.edge_layers(tiny_circuit(files, **config), folder))  # a layer has none
    edit(folder, means, judge=WordJudge())
    monkeypatch.setattr(
        "paving.circuit_run.rows.trained_slices", lambda _p, _b, _c, _t, mask, *_: sizes.append(mask.size) or 1 / 0
    )
    for name in ("inverse", "random"):
        with pytest.raises(ZeroDivisionError):
            evaluate(folder, means, against=[name], judge=WordJudge())
    assert sizes == [circuit.size] * 2


def test_weight_steering_has_fine_tunes_of_its_own(files, tmp_path, means, monkeypatch):
    seen = []

    def fitted(_backbone, _prompts, _openings, settings, **_):
        seen.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("paving.circuit_run.rows.fit_weight_steering", fitted)
    own = WeightSteeringConfig(epochs=1, learning_rate=3e-5)
    config = tiny_circuit(files, weight_steering=own)
    run_whole(files, tmp_path / "run", means, weight_steering=own)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "run", means, against=["ws"], judge=WordJudge())
    assert seen == [own.model_copy(update={"seed": config.arithmetic.seed})]
    assert config.arithmetic.learning_rate != own.learning_rate
