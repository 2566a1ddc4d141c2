"""A base of which a part stands on disk gives the bits of one in memory, and what would change weights refuses it."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from paving.backbone import BackboneError, load_backbone
from paving.backbone.projections import ffn_outputs
from paving.backbone.writers import stream_tensors
from paving.controller import Oracle
from paving.run import Means, train
from paving.steering.weight_steering import check_floats
from paving.traces.prompt_states import prompt_states
from paving.traces.store import TraceStore
from tiny_models import LATE, ROUTED, batch_of, decode, lively, some_prompts, tiny_model, tiny_tokenizer
from tiny_runs import WordJudge, tiny_run

pytest.importorskip("accelerate", reason="accelerate places the weights; it comes with paving[embedded]")

LITTLE = "offload:100KB"  # of about 300


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(checkpoint):
    return load_backbone(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def offloaded(checkpoint):
    found = load_backbone(checkpoint, device=LITTLE)
    away = [n for n, p in found.model.named_parameters() if p.is_meta]
    assert 0 < len(away) < len(list(found.model.parameters()))
    return found


def test_it_is_the_same_base(whole, offloaded):
    assert offloaded.fingerprint == whole.fingerprint
    assert offloaded.device == whole.device and offloaded.dtype == whole.dtype


@pytest.mark.parametrize("config", [ROUTED, LATE], ids=["early", "late"])
def test_it_is_read_and_edited_bit_for_bit(whole, offloaded, config):
    answers = []
    for backbone in (whole, offloaded):
        batch = batch_of(backbone, some_prompts()[:4])
        controller = lively(backbone, config, policy=Oracle())
        with controller.apply(backbone, batch) as applied:
            found = decode(backbone.model, batch, n=4, output_logits=True, return_dict_in_generate=True)
        answers.append((found.sequences, torch.stack(found.logits), applied.rows()))
    assert torch.equal(answers[0][0], answers[1][0]) and torch.equal(answers[0][1], answers[1][1])
    assert answers[0][2] == answers[1][2]


def test_states_of_prompts_are_the_same(whole, offloaded, tmp_path):
    prompts = some_prompts()[:3]
    found = [prompt_states(b, TraceStore(tmp_path / n), prompts) for n, b in (("a", whole), ("b", offloaded))]
    assert all(torch.equal(found[0][p.id].last, found[1][p.id].last) for p in prompts)


def test_a_run_on_it_trains_the_same_controller(tmp_path):
    weights = []
    for device in ("cpu", LITTLE):
        folder = tmp_path / device.partition(":")[0]
        folder.mkdir()
        config, _ = tiny_run(folder)
        means = Means(cache=folder / "traces", device=device)
        weights.append(train(config, folder / "run", means, WordJudge()).weights.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_would_change_weights_that_are_not_there_refuses(offloaded):
    for refuses in (ffn_outputs, check_floats, stream_tensors):
        with pytest.raises(BackboneError, match=r"needs all weights of .* in memory, and some are offloaded"):
            refuses(offloaded)


def test_a_wrong_size_is_one_clear_error(checkpoint):
    with pytest.raises(BackboneError, match=r"'lots' is no size\. Write for example offload:20GiB"):
        load_backbone(checkpoint, device="offload:lots")


def test_what_was_put_on_disk_goes_with_the_model(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    backbone = load_backbone(checkpoint, device=LITTLE)
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path.parent / "empty").mkdir(exist_ok=True)
    with pytest.raises(BackboneError, match="cannot load"):
        load_backbone(tmp_path.parent / "empty", device=LITTLE)
    assert len(list(tmp_path.iterdir())) == 1
    del backbone
    gc.collect()
    assert list(tmp_path.iterdir()) == []
