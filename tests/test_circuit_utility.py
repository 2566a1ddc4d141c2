"""Benchmarks on a circuit run: the edited weights answer as the exported checkpoint does, the base as itself."""

from __future__ import annotations

import shutil

import datasets
import pytest
from typer.testing import CliRunner

from paving import cli
from paving.backbone import load_backbone
from paving.circuit.checkpoint import export_checkpoint
from paving.circuit.delta_files import load_delta
from paving.circuit_run import edit, evaluate, find, utility
from paving.circuit_run.folder import read_circuit_config
from paving.evaluation.utility import Answers
from paving.evaluation.utility_harness import HarnessModel, ask, load_tasks
from paving.intervention import Identity
from paving.run import Means
from paving.run_folder import RunError
from paving.utility import FOLDER
from tiny_circuit_runs import WordJudge, tiny_circuit, write_circuit_files
from tiny_tasks import write_tasks


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, means) of a run with an edit that is large enough to be seen in scores."""
    home = tmp_path_factory.mktemp("circuit")
    files = write_circuit_files(home)
    means = Means.default(cache=home / "cache")
    find(tiny_circuit(files), home / "run", means)
    edit(home / "run", means, alpha=1.0, judge=WordJudge())
    evaluate(home / "run", means, judge=WordJudge())
    return home / "run", means


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return write_tasks(tmp_path / "tasks")


def test_the_run_scores_what_the_exported_checkpoint_scores_in_plain_transformers(run, tasks, tmp_path):
    folder, means = run
    task = str(tasks / "choice.yaml")
    (measured,) = utility(folder, [task], means).tasks
    held = {path.stem.rsplit(".", 1)[1]: path for path in (folder / FOLDER).iterdir()}
    base, edited = (Answers.model_validate_json(held[row].read_text()) for row in ("base", "c-delta-theta"))
    exported = export_checkpoint(read_circuit_config(folder).model, load_delta(folder / "delta"), None, tmp_path / "edited")
    checkpoint = load_backbone(exported)
    name, loaded = load_tasks(task)
    model = HarnessModel(checkpoint, Identity(), chat=True, batch_size=16)
    alone = ask(name, loaded[name], model, edited.settings, row="base", asked="")
    assert [q.values for q in alone.questions] == [q.values for q in edited.questions]
    assert [q.prompt for q in base.questions] == [q.prompt for q in edited.questions]
    assert measured.policy == "c-delta-theta" and measured.measures[0].n == 8
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<h2>Utility</h2>" in page and "gate open" not in page


def test_another_alpha_is_not_taken_for_this_one(run, tasks, tmp_path):
    folder, means = run
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    utility(copy, [str(tasks / "open.yaml")], means)
    shutil.rmtree(copy / "delta")
    edit(copy, means, alpha=0.5, judge=WordJudge())
    with pytest.raises(RunError, match="asked: "):
        utility(copy, [str(tasks / "open.yaml")], means)


def test_the_command_takes_either_kind_of_run(run, tasks, tmp_path):
    folder, _ = run
    arguments = ["utility", str(folder), "--tasks", str(tasks / "choice.yaml"), "--device", "cpu"]
    shown = CliRunner().invoke(cli.app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "tiny_choice: c-delta-theta\n" in shown.output and "acc %, n=8: base " in shown.output
    evaluate(folder, Means.default(), against=["as", "random"], judge=WordJudge())
    (folder / "comparators" / "random.safetensors").unlink()
    shown = CliRunner().invoke(cli.app, [*arguments, "--against", "as", "--against", "random"])
    assert shown.exit_code == 0, shown.output  # `random` is trained again, whose slices are gone
    assert "tiny_choice: as\n" in shown.output and "tiny_choice: random\n" in shown.output
    assert {p.name for p in (folder / FOLDER).glob("*choice*")} >= {
        f"tiny_choice.{r}.json" for r in ("base", "as", "random")
    }
    asked = Answers.model_validate_json((folder / FOLDER / "tiny_choice.random.json").read_text())
    base = Answers.model_validate_json((folder / FOLDER / "tiny_choice.base.json").read_text())
    assert [q.prompt for q in asked.questions] == [q.prompt for q in base.questions] and asked.questions != base.questions
    unknown = CliRunner().invoke(cli.app, [*arguments, "--against", "cast"])
    assert unknown.exit_code == 1 and "cast was not measured in" in unknown.output.replace("\n", " ")
    refused = CliRunner().invoke(cli.app, [*arguments, "--policy", "closed"])
    assert refused.exit_code == 1 and "no --policy gates it" in refused.output.replace("\n", " ")
    with pytest.raises(RunError, match="paving circuit edit"):
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        utility(tmp_path, ["any"], Means.default())
