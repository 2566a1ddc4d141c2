"""A delta's folder: what is saved is what is loaded, damage is refused by name, an interrupted write leaves nothing."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paving.backbone import BackboneError
from paving.backbone.weights import same_bits
from paving.circuit.delta import make_delta, with_metrics
from paving.circuit.delta_files import load_delta, save_delta, weights_sha256
from paving.circuit.folders import whole_folder
from paving.circuit.mask import CircuitError, Mask
from paving.circuit.slices import SliceDelta
from tiny_deltas import RATE, gpt2_backbone, tiny_delta
from tiny_models import tiny_backbone


@pytest.fixture(scope="module")
def delta(backbone):
    return tiny_delta(backbone, metrics={"benign_over_refusal": RATE}, recipe={"seed": 0, "kappa": 0.2})


@pytest.fixture
def folder(delta, tmp_path):
    return save_delta(delta, tmp_path / "delta")


def described(folder, **changes):
    """delta.json with some fields changed, its hash of the weights kept right."""
    path = folder / "delta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reweighted(folder, change):
    """delta.safetensors with its tensors changed, and its new hash written into delta.json."""
    path = folder / "delta.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    described(folder, weights_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize("reading", ["neurons", "outputs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loaded_delta_is_the_saved_one_bit_for_bit(tmp_path, reading, dtype):
    delta = tiny_delta(tiny_backbone(dtype=dtype), reading=reading, metrics={"harmful_refusal": RATE})
    again = load_delta(save_delta(delta, tmp_path / "d"))
    assert again.description == delta.description
    assert again.mask == delta.mask
    assert all(same_bits(again.slices.values[n], delta.slices.values[n]) for n in delta.mask.channels)
    assert all(same_bits(again.base[n], delta.base[n]) for n in delta.mask.channels)
    assert all(same_bits(one, two) for one, two in zip(again.edited().values(), delta.edited().values(), strict=True))
    assert weights_sha256(again) == json.loads((tmp_path / "d" / "delta.json").read_text())["weights_sha256"]


def test_the_folder_holds_indices_values_and_base_slices_and_no_pickle(folder, delta):
    assert sorted(p.name for p in folder.iterdir()) == ["delta.json", "delta.safetensors"]
    tensors = safetensors.torch.load_file(folder / "delta.safetensors")
    layer = next(iter(delta.mask.channels))
    assert tensors[f"components.0.channels.{layer}"].dtype == torch.int32
    assert tensors[f"components.0.delta.{layer}"].dtype == delta.base[layer].dtype
    assert set(tensors) == {
        f"{what}.{n}" for n in delta.mask.channels for what in ("base", "components.0.channels", "components.0.delta")
    }
    about = json.loads((folder / "delta.json").read_text())
    assert about["layers"][0]["parameter"] == f"model.layers.{layer}.mlp.down_proj.weight"
    assert about["layers"][0]["transposed"] is False
    assert about["components"][0]["recipe"] == {"seed": 0, "kappa": 0.2}
    assert len(about["components"][0]["scores"]["1"]) == about["n"] == 48


def test_transposed_storage_is_said(tmp_path):
    delta = tiny_delta(gpt2_backbone())
    assert all(line.transposed for line in load_delta(save_delta(delta, tmp_path / "d")).description.layers)


def test_metrics_can_be_added_later(delta, tmp_path):
    measured = load_delta(save_delta(with_metrics(delta, {"harmful_refusal": RATE}), tmp_path / "d"))
    assert measured.description.metrics == {"harmful_refusal": RATE}
    assert delta.description.metrics == {"benign_over_refusal": RATE}
    with pytest.raises(CircuitError, match="metrics cannot be saved: metrics"):
        with_metrics(delta, {"harmful_refusal": torch.tensor(0.5)})


def test_a_base_given_as_a_folder_is_named_without_its_path(tmp_path, backbone):
    (tmp_path / "my-base").mkdir()
    named = type(backbone)(str(tmp_path / "my-base"), backbone.model, backbone.tokenizer)
    assert tiny_delta(named).description.base.name == "my-base"


def test_an_existing_folder_is_overwritten_only_when_asked(delta, folder, tmp_path):
    with pytest.raises(CircuitError, match=r"exists already.*overwrite=True"):
        save_delta(delta, folder)
    other = with_metrics(delta, {})
    save_delta(other, folder, overwrite=True)
    assert load_delta(folder).description == other.description
    assert [p.name for p in tmp_path.iterdir()] == ["delta"]
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("mine")
    with pytest.raises(CircuitError, match="holds no delta"):
        save_delta(delta, tmp_path / "letters", overwrite=True)
    assert (tmp_path / "letters" / "a.txt").read_text() == "mine"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("no space left")], ids=["interrupt", "full disk"])
def test_an_interrupted_write_leaves_nothing(delta, tmp_path, monkeypatch, stop):
    def fails(path, *args, **kwargs):
        raise stop

    monkeypatch.setattr("pathlib.Path.write_text", fails)
    with pytest.raises((KeyboardInterrupt, CircuitError)):
        save_delta(delta, tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_overwrite_keeps_what_was_there(delta, folder, monkeypatch):
    monkeypatch.setattr("pathlib.Path.write_text", lambda *a, **k: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(CircuitError, match="full"):
        save_delta(with_metrics(delta, {}), folder, overwrite=True)
    assert load_delta(folder).description == delta.description


def test_an_overwrite_that_is_stopped_between_its_two_renames_puts_the_old_one_back(delta, folder, tmp_path, monkeypatch):
    rename, renamed = os.replace, []

    def stopped(source, target):
        renamed.append(target)
        if len(renamed) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr("os.replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_delta(with_metrics(delta, {}), folder, overwrite=True)
    assert load_delta(folder).description == delta.description
    assert [p.name for p in tmp_path.iterdir()] == ["delta"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(CircuitError, match="exists already"), whole_folder(tmp_path / "d") as partial:
        (partial / "a").write_text("new")
        (tmp_path / "d").mkdir()
    assert [p.name for p in tmp_path.rglob("*")] == ["d"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_of_the_values_is_found(folder, share, bit):
    path = folder / "delta.safetensors"
    content = path.read_bytes()
    at = int(share * len(content))
    path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
    try:
        with pytest.raises(CircuitError, match=r"delta\.safetensors is damaged"):
            load_delta(folder)
    finally:
        path.write_bytes(content)
    load_delta(folder)


def test_missing_files_other_formats_and_damage_are_one_clear_error_each(folder, tmp_path):
    with pytest.raises(CircuitError, match=r"holds no delta: delta\.json is missing"):
        load_delta(tmp_path)
    described(folder, format=2, something="new")
    with pytest.raises(CircuitError, match="has format 2; this version reads format 1"):
        load_delta(folder)
    described(folder, format=1)
    with pytest.raises(CircuitError, match="something: Extra inputs"):
        load_delta(folder)
    (folder / "delta.json").write_text("[1, 2]")
    with pytest.raises(CircuitError, match="format None"):
        load_delta(folder)
    (folder / "delta.json").write_text('{"format": 1, ')
    with pytest.raises(CircuitError, match="cannot be read"):
        load_delta(folder)


def test_a_delta_without_its_values_is_refused(folder):
    (folder / "delta.safetensors").unlink()
    with pytest.raises(CircuitError, match=r"delta\.safetensors cannot be read"):
        load_delta(folder)


def change(name, new):
    return lambda tensors: tensors.update({name: new(tensors[name])})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (change("components.0.channels.2", lambda t: t + 40), "layer 2 has channels 0..47, but the mask names"),
        (change("components.0.channels.2", lambda t: t.flip(0)), "must be sorted"),
        (change("components.0.channels.2", lambda t: t.long()), "not a list of int32"),
        (change("components.0.channels.2", lambda t: t[1:]), "not those described"),
        (change("components.0.delta.2", lambda t: t.bfloat16()), "delta of layer 2 is"),
        (change("components.0.delta.2", lambda t: t[:, 1:].contiguous()), "delta of layer 2 is"),
        (change("components.0.delta.2", lambda t: t / 0), "not finite"),
        (change("components.0.delta.2", lambda t: t * 2), "base \\+ alpha \\* delta of layer 2 is not what was written"),
        (change("base.2", lambda t: t[:, 1:].contiguous()), "base's slice of layer 2"),
        (lambda t: t.pop("base.2"), "not those described"),
        (lambda t: t.pop("components.0.channels.2"), "channels and values of different layers"),
        (lambda t: t.update(theta_minus=torch.zeros(3)), "tensors that no component names"),
    ],
)
def test_values_that_contradict_the_description_are_refused(folder, damage, says):
    reweighted(folder, damage)
    with pytest.raises(CircuitError, match=says):
        load_delta(folder)


def test_a_changed_alpha_is_refused(folder):
    components = json.loads((folder / "delta.json").read_text())["components"]
    described(folder, components=[{**components[0], "alpha": 1.8}])
    with pytest.raises(CircuitError, match="alpha or the hash"):
        load_delta(folder)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_positive(backbone, delta, alpha):
    with pytest.raises(CircuitError, match="alpha"):
        tiny_delta(backbone, alpha=alpha)
    with pytest.raises(CircuitError, match="give a positive number"):
        delta.edit(alpha)


def test_an_edit_that_overflows_the_dtype_is_refused(backbone):
    with pytest.raises(CircuitError, match=r"not finite in torch\.float16 at alpha 1e\+06"):
        tiny_delta(tiny_backbone(dtype=torch.float16), alpha=1e6)


def test_values_that_do_not_fit_the_base_are_refused(backbone, delta):
    layer, values = next(iter(delta.mask.channels)), dict(delta.parts[0].values)
    with pytest.raises(CircuitError, match="Train it on the base in the base's own dtype"):
        changed = SliceDelta(delta.mask, {**values, layer: values[layer].half()})
        make_delta(backbone, changed, category="crime", alpha=1.0)
    with pytest.raises(CircuitError, match="not finite"):
        changed = SliceDelta(delta.mask, {**values, layer: values[layer] * float("nan")})
        make_delta(backbone, changed, category="crime", alpha=1.0)
    with pytest.raises(CircuitError, match="made for another model"):
        mask = Mask("neurons", 64, {1: (0,)})
        make_delta(backbone, SliceDelta(mask, {1: torch.zeros(32, 1)}), category="crime", alpha=1.0)
    with pytest.raises(CircuitError, match="category"):
        tiny_delta(backbone, category="")


def test_tied_projections_are_refused():
    backbone = tiny_backbone()
    layers = backbone.layers
    layers[2].mlp.down_proj.weight = layers[1].mlp.down_proj.weight
    with pytest.raises(BackboneError, match="tied"):
        make_delta(backbone, SliceDelta(Mask("neurons", 48, {1: (0,)}), {1: torch.zeros(32, 1)}), category="x", alpha=1)
