"""Which engine decodes a run's rows, and what each row asks of one that serves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from paving.cli import app
from paving.controller import ControllerError, Hard, Oracle, Soft
from paving.controller.gates import Uniform
from paving.generation import Transformers
from paving.intervention import Identity
from paving.prompts import Bucket, Prompt
from paving.run_engine import answers_folder, engine_of
from paving.run_folder import RunError
from paving.serving import offline
from paving.serving.admission import BUCKET, POLICY, VETO
from paving.serving.offline import asked_of
from tiny_models import ROUTED, lively, tiny_backbone

PROMPT = Prompt("p", "x", Bucket.HARMFUL_KEEP, group="p")


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.fixture(scope="module")
def controller(backbone):
    return lively(backbone, ROUTED.resolved(backbone), policy=Hard(0.25))


def test_each_row_asks_for_its_gate_and_the_oracle_alone_tells_the_bucket(controller):
    rows = {
        "base": Identity(),
        "learned": controller,
        "soft+veto": controller.with_policy(Soft(), use_veto=True),
        "oracle": controller.with_policy(Oracle()),
    }
    veto = int(controller.use_veto)
    assert {name: asked_of(controller, row, PROMPT) for name, row in rows.items()} == {
        "base": {POLICY: "closed"},
        "learned": {POLICY: "default", VETO: veto},
        "soft+veto": {POLICY: "soft", VETO: 1},
        "oracle": {POLICY: "oracle", VETO: veto, BUCKET: "harmful_keep"},
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.with_scale(c.scale + 1), "its own scale and mixture"),
        (lambda c: c.with_mixture(Uniform()), "its own scale and mixture"),
        (lambda c: replace(c, weights=lively(tiny_backbone(), c.config).weights), "its own scale and mixture"),
        (lambda c: c.with_policy(Hard(0.5)), "a threshold of its own"),
    ],
)
def test_a_row_that_is_not_served_is_refused_and_not_decoded_as_another(controller, change, said):
    with pytest.raises(ValueError, match=said):
        asked_of(controller, change(controller), PROMPT)


def test_engines_that_cannot_be_had_are_one_clear_error(backbone, controller, tmp_path, monkeypatch):
    with engine_of("transformers", tmp_path, controller, backbone, None) as engine:
        assert isinstance(engine, Transformers)
    with pytest.raises(RunError, match="engine options are vLLM's own"), engine_of(
        "transformers", tmp_path, controller, backbone, {"x": 1}
    ):  # fmt: skip
        pass
    monkeypatch.setattr(offline, "find_spec", lambda _name: None)
    with pytest.raises(ControllerError, match="the engine vllm needs vLLM"), engine_of(
        "vllm", tmp_path, controller, backbone, None
    ):  # fmt: skip
        pass
    with pytest.raises(RunError, match="the engine 'tgi' is not known; allowed: transformers, vllm"):
        answers_folder(tmp_path, "tgi")
    assert (answers_folder(tmp_path, "transformers"), answers_folder(tmp_path, "vllm")) == (
        tmp_path,
        tmp_path / "engines" / "vllm",
    )


@pytest.mark.parametrize("options", ["{", "[1]"])
def test_engine_options_are_a_json_object(tmp_path, options):
    result = CliRunner().invoke(app, ["eval", str(tmp_path), "--engine", "vllm", "--engine-options", options])
    assert result.exit_code == 1 and "--engine-options takes a JSON object" in result.output
