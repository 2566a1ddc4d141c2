"""What the scaling table counts is what this project writes and builds, byte for byte, on models of two shapes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from paving.backbone import checked_ids
from paving.circuit.delta_files import save_delta
from paving.controller import ControllerConfig, fresh_controller
from paving.traces.base import BaseTraces, Forced
from paving.traces.store import TraceStore
from tiny_deltas import tiny_delta
from tiny_models import HIDDEN, LAYERS, SIZES, VOCABULARY, some_prompts, tiny_backbone


@pytest.fixture(params=["llama", "qwen3"])
def backbone(request):
    return tiny_backbone(request.param, dtype=torch.bfloat16)


def shape_of(scaling, backbone):
    kv = backbone.model.config.num_key_value_heads * 8
    return scaling.Shape("tiny", LAYERS, HIDDEN, SIZES["intermediate_size"], kv, VOCABULARY)


def test_a_prompts_traces_take_what_is_counted(script, backbone, tmp_path):
    scaling = script("scaling")
    shape, store = shape_of(scaling, backbone), TraceStore(tmp_path)
    prompt = some_prompts()[0]
    row = Forced(prompt.id, prompt.bucket, tuple(checked_ids(backbone, prompt)), (5, 6, 7, 8))
    BaseTraces(backbone, store, k=16).build([row], with_resid=True)
    found = {}
    for path in tmp_path.rglob("*.safetensors"):
        tensors = load_file(path)
        found["prefix" if "kv" in tensors else "trace"] = sum(t.nbytes for t in tensors.values())
    assert found["trace"] == scaling.trace_bytes(shape, 4, 16) + scaling.resid_bytes(shape, 4)
    assert found["prefix"] == scaling.prefix_bytes(shape, len(row.prompt_ids))


def test_experts_hold_what_is_counted(script, backbone):
    scaling = script("scaling")
    config = ControllerConfig(route_layers=(0, 1), bottleneck_ratio=4)
    experts = fresh_controller(backbone, config, seed=0).weights.experts
    assert scaling.expert_parameters(shape_of(scaling, backbone), config) == sum(p.numel() for p in experts.parameters())


def test_a_delta_takes_what_is_counted(script, backbone, tmp_path):
    scaling = script("scaling")
    folder = save_delta(tiny_delta(backbone, fraction=0.25), tmp_path / "delta")
    values = [t for path in folder.glob("*.safetensors") for t in load_file(path).values() if t.is_floating_point()]
    assert sum(t.nbytes for t in values) == scaling.delta_bytes(shape_of(scaling, backbone), 0.25)


def test_published_models_have_the_parameters_that_are_counted(script):
    counted = {s.name: s.parameters / 1e9 for s in script("scaling").SHAPES}
    assert counted == pytest.approx({"7B": 6.74, "70B": 70.6, "405B": 405.9}, rel=0.01)


def test_twice_the_prompts_take_twice_the_time_and_disk_and_no_more_devices(script):
    scaling = script("scaling")
    for shape in scaling.SHAPES:
        one, two = (scaling.stages(shape, n, 128, 4e14, 2e12) for n in (10_000, 20_000))
        for a, b in zip(one, two, strict=True):
            assert b.device_bytes == a.device_bytes
            if "200 pairs" not in a.name:
                assert b.hours == pytest.approx(2 * a.hours)
