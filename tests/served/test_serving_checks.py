"""What a server refuses to start with: each of these would leave some request unedited, or edit the wrong one."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from paving.controller.config import ControllerConfig
from paving.controller.store import save_controller
from paving.serving import entry, plugin
from paving.serving.plugin import ServingError, check_config, check_dtype, check_output, check_version, decoder_layers
from paving.serving.served import Served
from tiny_models import ROUTED, lively, tiny_backbone


def config(**changes):
    """What vLLM's configuration holds of interest, all as it should be; `part__name=value` changes one."""
    found = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]),
            enforce_eager=True,
            quantization=None,
            enable_prompt_embeds=False,
        ),
        parallel_config=SimpleNamespace(
            world_size=1,
            tensor_parallel_size=1,
            data_parallel_size=1,
            decode_context_parallel_size=1,
            use_ubatching=False,
        ),
        cache_config=SimpleNamespace(enable_prefix_caching=True, kv_sharing_fast_prefill=False),
        load_config=SimpleNamespace(load_format="auto"),
        speculative_config=None,
        kv_transfer_config=None,
        lora_config=None,
    )
    for place, value in changes.items():
        *path, name = place.split("__")
        part = found
        for step in path:
            part = getattr(part, step)
        setattr(part, name, value)
    return found


@pytest.fixture(scope="module")
def controller():
    backbone = tiny_backbone()
    return lively(backbone, ROUTED.resolved(backbone))


def test_a_plain_configuration_is_served(controller):
    check_config(config(), controller)
    check_config(config(parallel_config__world_size=2, parallel_config__tensor_parallel_size=2), controller)


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("model_config__hf_config__architectures", ["CohereForCausalLM"], "architecture CohereForCausalLM"),
        ("model_config__hf_config__architectures", None, "architecture"),
        ("model_config__enforce_eager", False, "--enforce-eager"),
        ("model_config__quantization", "awq", "quantised"),
        ("model_config__enable_prompt_embeds", True, "prompt embeddings"),
        ("parallel_config__world_size", 2, "parallelism"),
        ("parallel_config__data_parallel_size", 2, "parallelism"),
        ("parallel_config__decode_context_parallel_size", 2, "parallelism"),
        ("parallel_config__use_ubatching", True, "--enable-dbo"),
        ("cache_config__kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill"),
        ("load_config__load_format", "dummy", "--load-format"),
        ("speculative_config", object(), "speculative"),
        ("kv_transfer_config", object(), "KV transfer"),
        ("lora_config", object(), "LoRA"),
    ],
)
def test_what_would_serve_wrongly_is_refused(controller, place, value, told):
    with pytest.raises(ServingError, match=told):
        check_config(config(**{place: value}), controller)


def test_a_mean_over_the_prompt_needs_the_whole_prompt():
    layers = ControllerConfig(route_layers=(0, 1), edit_layers=(3, 4), pooling="mean", bottleneck_ratio=4, router_hidden=8)
    averaging = lively(tiny_backbone(), layers)
    with pytest.raises(ServingError, match="--no-enable-prefix-caching"):
        check_config(config(), averaging)
    check_config(config(cache_config__enable_prefix_caching=False), averaging)


@pytest.mark.parametrize(("found", "ok"), [("0.32.0", True), ("0.32.1+cpu", True), ("0.33.0", False), ("0.3.2", False)])
def test_another_vllm_is_refused(monkeypatch, found, ok):
    monkeypatch.setattr(plugin, "version", lambda _name: found)
    if ok:
        check_version()
    else:
        with pytest.raises(ServingError, match=f"this is {found}"):
            check_version()


def test_blocks_are_found_where_decoders_have_them_and_nowhere_else():
    blocks = nn.ModuleList([nn.Identity()])
    model = nn.Module()
    with pytest.raises(ServingError, match="blocks of Module are not found"):
        decoder_layers(model)
    model.model = nn.Module()
    model.model.layers = blocks
    assert decoder_layers(model) is blocks


@pytest.mark.parametrize(
    "output",
    [
        torch.zeros(3, 32),
        (torch.zeros(3, 32),),
        (torch.zeros(3, 32), torch.zeros(3, 16)),
        (torch.zeros(3, 32), torch.zeros(3, 32, dtype=torch.bfloat16)),
        (torch.zeros(3, 32), None),
        (torch.zeros(3, 32), torch.zeros(3, 32), torch.zeros(3, 32)),
    ],
    ids=["one tensor", "one of a tuple", "another width", "another dtype", "none beside it", "three"],
)
def test_blocks_that_return_something_else_are_refused_in_the_profile_run(controller, output):
    served = Served(controller, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(ServingError, match="blocks of this model return"):
        check_output(output, served)
    check_output((torch.zeros(3, 32), torch.zeros(3, 32)), served)


def test_another_dtype_than_the_calibrations_is_said(controller, tmp_path, caplog):
    save_controller(controller, tmp_path / "c", {"trained_on": {"dtype": "float32"}})
    check_dtype(str(tmp_path / "c"), torch.float32)
    save_controller(controller, tmp_path / "before")  # of a version that kept none
    check_dtype(str(tmp_path / "before"), torch.bfloat16)
    assert not caplog.text
    check_dtype(str(tmp_path / "c"), torch.bfloat16)
    assert "calibrated in float32 and is served in bfloat16" in caplog.text


def test_without_a_controller_nothing_is_touched(monkeypatch):
    monkeypatch.delenv(entry.CONTROLLER, raising=False)
    monkeypatch.setattr(plugin, "install", lambda _where: pytest.fail("installed"))
    entry.register()


def test_with_a_controller_the_runner_that_can_serve_it_is_chosen_unless_told_otherwise(monkeypatch):
    asked = []
    monkeypatch.setattr(plugin, "install", asked.append)
    monkeypatch.setenv(entry.CONTROLLER, "my-run")
    for given, found in ((None, "0"), ("1", "1")):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", given or "")
        if given is None:
            monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
        entry.register()
        assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == found
    assert asked == ["my-run", "my-run"]
