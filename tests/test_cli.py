"""The command line: what it prints, and that a bad input is one clear line, exit code 1 and no traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from paving.cli import app
from paving.controller import ThresholdedSoft, save_controller
from paving.run_folder import RunConfig, open_run
from paving.terminal import layers
from paving.training.config import TrainingConfig
from tiny_models import lively, tiny_backbone, tiny_model, tiny_tokenizer

runner = CliRunner()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PAVING_CACHE", str(tmp_path / "user-cache"))
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def paving(*arguments, **options):
    return runner.invoke(app, [str(a) for a in arguments], **options)


def refused(*arguments) -> str:
    """The one line that a refused command prints on stderr; stdout stays empty."""
    result = paving(*arguments)
    assert result.exit_code == 1, (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("Error:")]
    assert "Traceback" not in result.stderr
    assert len(errors) == 1 and errors[0] == lines[-1], result.stderr
    return errors[0]


# --- what works without a model ---------------------------------------------------------------------------------


def test_commands_that_are_not_divided_refuse_a_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == 1 and "only train and eval are divided" in result.output


def test_help_names_every_command():
    result = paving("--help")
    assert result.exit_code == 0
    for command in ("demo", "organism", "train", "eval", "report", "chat", "models", "judge", "agree", "sample", "diagnose"):
        assert re.search(rf"\b{command}\b", result.output)


@pytest.mark.parametrize(
    "command",
    ["demo", "train", "eval", "report", "chat", "models", "organism build", "judge", "agree", "sample", "diagnose"],
)
def test_every_command_explains_itself(command):
    result = paving(*command.split(), "--help")
    assert result.exit_code == 0 and "Usage" in result.output


def test_presets_are_json_and_nothing_else_on_stdout():
    result = paving("models", "--json")
    presets = json.loads(result.stdout)
    gemma = next(p for p in presets if p["model"] == "google/gemma-3-4b-it")
    assert (gemma["route_layers"], gemma["edit_layers"], gemma["scale"]) == ([1, 2, 3, 4], [5, 33], 8.0)
    assert "google/gemma-3-4b-it" in paving("models").stdout.replace("\n", "")


def test_help_does_not_wait_for_torch():
    code = "import sys, paving.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "found"), [("1-4", (1, 2, 3, 4)), ("8,12,16", (8, 12, 16)), (" 9 , 1-2", (1, 2, 9)), ("3", (3,))]
)
def test_layers_are_written_as_ranges_and_lists(text, found):
    assert layers(text) == found


def tree(folder) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# --- refusals without a model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["one", "1-", "-3", "1-4;7", "1,,2"])
def test_a_layer_that_is_none_is_named(tmp_path, text):
    line = refused("train", "--out", tmp_path / "run", f"--route-layers={text}")
    assert "is no layer or range of layers. Write for example 1-4 or 8,12,16." in line
    assert not (tmp_path / "run").exists()


def test_an_oracle_chat_is_refused_before_anything_is_loaded(tmp_path):
    assert "no labels for the oracle gate; use soft, hard, thresholded or closed" in refused(
        "chat", tmp_path, "--policy", "oracle"
    )


def test_a_chat_without_a_controller_is_refused(tmp_path):
    assert "holds no controller: controller.json is missing" in refused("chat", tmp_path)
    assert "there is no controller folder" in refused("chat", tmp_path / "nowhere")


def test_a_folder_that_is_no_run_folder_is_refused(tmp_path):
    assert "is no run folder: config.json is missing" in refused("eval", tmp_path)
    assert "has no metrics.json yet. Evaluate it first" in refused("report", tmp_path)
    (tmp_path / "thesis.txt").write_text("mine")
    assert "holds files but no config.json" in refused("train", "--out", tmp_path)
    assert tree(tmp_path) == {"thesis.txt": b"mine"}


def test_a_run_folder_of_another_configuration_is_refused_and_left_as_it_is(tmp_path):
    run = tmp_path / "run"
    open_run(RunConfig(model="./no-such-model", split_seed=1, training=TrainingConfig(seed=1)), run)
    before = tree(run)
    assert "config.json" in before
    line = refused("train", "--out", run, "--model", "./no-such-model", "--seed", 2)
    assert "belongs to another configuration (split_seed: 1 there, 2 asked; training.seed: 1 there, 2 asked)" in line
    assert "nothing was changed" in line
    assert tree(run) == before


def test_evaluation_without_a_controller_says_how_to_train_one(tmp_path):
    run = tmp_path / "run"
    open_run(RunConfig(model="./no-such-model"), run)
    assert "has no finished controller. Train it first: paving train --out" in refused("eval", run)


def test_a_model_that_is_not_there_is_named_and_leaves_no_run_folder(tmp_path):
    line = refused("train", "--out", tmp_path / "run", "--model", "./no-such-model")
    assert "there is no model folder ./no-such-model" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot read the configuration"),
        ('{"modell": "x"}', "modell: Extra inputs are not permitted"),
        ('{"training": {"horizon": 1}}', "training.horizon: "),
    ],
)
def test_a_configuration_file_that_cannot_be_used_is_named_with_the_field(tmp_path, content, says):
    file = tmp_path / "config.json"
    file.write_text(content)
    assert says in refused("train", "--out", tmp_path / "run", "--config", file)


def test_an_organism_is_never_written_over_something(tmp_path):
    (tmp_path / "here").mkdir()
    line = refused("organism", "build", "--out", tmp_path / "here", "--base", "./no-such-model")
    assert "exists already" in line and "Nothing was overwritten" in line


@pytest.mark.parametrize("arguments", [("train",), ("eval",), ("train", "--out"), ("no-such-command",)])
def test_a_command_that_is_incomplete_is_a_usage_error(arguments):
    result = paving(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output


# --- refusals with a tiny model ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"prompt": "one"}\n{"prompt": \n', r"edits\.jsonl:2"),
        ('{"prompt": "one"}\n{"prompt": "  "}\n', r"edits\.jsonl:2.*`prompt` is blank"),
        ('{"query": "one"}\n', r"edits\.jsonl:1.*no prompt column"),
        ("", r"edits\.jsonl holds no rows"),
    ],
)
def test_a_malformed_prompt_file_is_named_with_its_line(tmp_path, checkpoint, content, says):
    file = tmp_path / "edits.jsonl"
    file.write_text(content)
    line = refused("train", "--out", tmp_path / "run", "--model", checkpoint, "--edit", file, "--device", "cpu",
                   "--route-layers=0-1")  # fmt: skip
    assert re.search(says, line), line


def test_a_layer_that_the_model_does_not_have_is_refused_before_any_work(tmp_path, checkpoint):
    line = refused("train", "--out", tmp_path / "run", "--model", checkpoint, "--device", "cpu", "--route-layers=1-9")
    assert "route layer 6 does not exist" in line and "has layers 0..5" in line
    assert not (tmp_path / "run").exists()  # the corrected command can use the same --out


@pytest.fixture
def controller(tmp_path, checkpoint):
    return save_controller(lively(tiny_backbone("llama"), policy=ThresholdedSoft(0.0), use_veto=True), tmp_path / "c")


def test_an_unknown_policy_is_refused_with_what_is_allowed(checkpoint, controller):
    line = refused("chat", controller, "--model", checkpoint, "--device", "cpu", "--policy", "often")
    assert "gate policy 'often' is not known; allowed: soft, hard, thresholded, closed" in line


def test_a_controller_of_another_model_is_refused_by_name(tmp_path, controller):
    other = tmp_path / "other"
    tiny_model("llama", seed=5).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    line = refused("chat", controller, "--model", other, "--device", "cpu")
    assert "was trained for tiny-llama" in line and "but the model at hand is" in line


def test_a_chat_shows_the_gate_of_every_turn_and_forgets_on_reset(checkpoint, controller):
    turns = "w1 w2 w3\nw4\n/reset\nw1 w2 w3\n/quit\nw9\n"
    result = paving("chat", controller, "--model", checkpoint, "--device", "cpu", "--max-new-tokens", 3, input=turns)
    assert result.exit_code == 0, result.output
    shown = [line.replace("you> ", "") for line in result.stdout.splitlines() if "gate 0" in line]
    assert len(shown) == 3, result.stdout
    assert shown[0] == shown[2] != shown[1]
    assert all("mixture" in line for line in shown)
    asked = ["--model", checkpoint, "--device", "cpu", "--max-new-tokens", 3]
    behind = paving("chat", controller, *asked, "--system", "w150 w151", input="w1 w2 w3\n/reset\nw1 w2 w3\n")
    gates = [line.replace("you> ", "") for line in behind.stdout.splitlines() if "gate 0" in line]
    assert gates[0] == gates[1] != shown[0]  # /reset forgets the conversation, not what it begins with


def test_interrupting_is_told_apart_from_failing(monkeypatch, tmp_path):
    from paving import run

    def interrupted(_folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "report", interrupted)
    result = paving("report", tmp_path)
    assert result.exit_code == 130
    assert "the same command goes on from there" in " ".join(result.stderr.split())


def test_router_search_prints_what_it_tried_and_what_comes_next(tmp_path, monkeypatch):
    figures = {"auc": 0.9, "partial_auc": 0.8, "opened": 0.7}
    tried = {"layers": [1, 2], "pooling": "last", "kernel": "rbf", "contrast": "none"} | figures
    record = {
        "why": "because",
        "opened": {"edit": 0.7, "harmful_keep": 0.02},
        "prompts": {"edit": 90, "harmful_keep": 50},
        "pairs": {"kinds": 12},
        "pairs_dropped": 3,
        "tried": [tried],
        "promises": [],
        "threshold": 0.0,
    }
    asked = []
    monkeypatch.setattr("paving.router_search.search_router", lambda *a: asked.append(a) or record)
    result = paving("router", "search", str(tmp_path), "--out", str(tmp_path / "new"), "--layers", "1-2", "--layers", "3")
    assert result.exit_code == 0, result.output
    assert "chosen: because" in result.stdout and "edit 70.0 % of 90" in result.stdout and "paving eval" in result.stdout
    assert "on new ones expect more" in result.stdout and "kinds 12; 3 left out" in result.stdout
    assert asked[0][2].layers == ((1, 2), (3,)) and asked[0][4] is None
    paving("router", "search", str(tmp_path), "--out", str(tmp_path / "new"), "--promise", "0.1,delta=0.2")
    assert (asked[1][4].harmful, asked[1][4].delta) == (0.1, 0.2)
    assert (asked[0][2].clothes, "copies" in result.stdout) == (0, False)
    worn = {"copies": 280, "opened": {"edit": 0.61}, "kinds": ["capitals"], "unsaid": ["a system prompt"]}
    record["clothes"] = worn
    dressed = paving("router", "search", str(tmp_path), "--out", str(tmp_path / "new"), "--clothes", "2").stdout
    assert asked[2][2].clothes == 2 and "of 280 copies in other clothes: edit 61.0 %" in " ".join(dressed.split())
    assert "chat template cannot say a system prompt" in " ".join(dressed.split())
    wrong = paving("router", "search", str(tmp_path), "--out", str(tmp_path / "new"), "--promise", "often")
    assert wrong.exit_code == 1 and "is no promise" in wrong.stderr
    printed = paving("router", "search", str(tmp_path), "--out", str(tmp_path / "new"), "--json")
    assert json.loads(printed.stdout) == record
