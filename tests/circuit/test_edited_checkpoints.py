"""Edited checkpoints: what plain transformers loads answers as the edit in memory does, and the base comes back from it."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from paving.backbone import load_backbone
from paving.circuit import checkpoint as checkpoints
from paving.circuit.base_files import fingerprint_of_files
from paving.circuit.checkpoint import apply_to, export_checkpoint, remove_from
from paving.circuit.delta import with_metrics
from paving.circuit.delta_files import load_delta, save_delta, weights_sha256
from paving.circuit.mask import CircuitError, Mask
from paving.circuit.shards import checkpoint_folder, open_checkpoint, stored_name
from paving.generation import Decoding, generate
from paving.intervention import Identity
from tiny_deltas import RATE, gpt2_backbone, saved, saved_llama, tiny_delta
from tiny_models import batch_of, decode, logits_of, some_prompts, tiny_backbone


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama in a folder, in several shards."""
    return saved_llama(tmp_path_factory.mktemp("llama") / "base", max_shard_size="60KB")


@pytest.fixture(scope="module")
def delta(base):
    return tiny_delta(base, metrics={"benign_over_refusal": RATE})


def tensors_of(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_tensors(one, other):
    a, b = tensors_of(one), tensors_of(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def built(kind, dtype, folder):
    backbone = gpt2_backbone(dtype) if kind == "gpt2" else tiny_backbone(kind, dtype=dtype)
    return load_backbone(saved(backbone, folder, max_shard_size="60KB"))


@pytest.mark.parametrize("reading", ["neurons", "outputs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_export_answers_token_for_token_as_the_edit_in_memory(tmp_path, kind, dtype, reading):
    base = built(kind, dtype, tmp_path / "base")
    delta = load_delta(save_delta(tiny_delta(base, reading=reading), tmp_path / "delta"))
    out = export_checkpoint(base, delta, None, tmp_path / "edited")

    model = AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).chat_template == base.tokenizer.chat_template
    batch = batch_of(base, some_prompts())
    untouched = decode(base.model, batch, n=12)
    with delta.edit().apply(base, batch):
        in_memory, logits = decode(base.model, batch, n=12), logits_of(base, batch)
    again = load_backbone(out)
    assert model.dtype == dtype
    assert torch.equal(decode(model.eval(), batch, n=12), in_memory)
    assert torch.equal(logits_of(again, batch), logits)
    assert not torch.equal(in_memory, untouched)


def test_generate_gives_the_same_completions(base, delta, tmp_path):
    edited = load_backbone(export_checkpoint(base, delta, None, tmp_path / "edited"))
    prompts, decoding = some_prompts(), Decoding(max_new_tokens=10)
    texts = [c.response for c in generate(edited, prompts, Identity(), decoding)]
    assert texts == [c.response for c in generate(base, prompts, delta.edit(), decoding)]
    assert texts != [c.response for c in generate(base, prompts, Identity(), decoding)]


def test_a_multimodal_checkpoint_whose_files_name_tensors_otherwise(tmp_path):
    base = load_backbone(saved(tiny_backbone("gemma3-multimodal"), tmp_path / "base"))
    delta = tiny_delta(base)
    names = open_checkpoint(tmp_path / "base").tensors
    assert delta.description.layers[0].parameter not in names
    out = export_checkpoint(base, delta, None, tmp_path / "edited")
    batch = batch_of(base, some_prompts())
    with delta.edit().apply(base, batch):
        assert torch.equal(logits_of(load_backbone(out), batch), logits_of(base, batch))
    assert_same_tensors(remove_from(out, delta, tmp_path / "again"), tmp_path / "base")


def test_shards_headers_and_everything_off_the_mask_are_the_bases(base, delta, tmp_path):
    folder, out = checkpoint_folder(base.name), export_checkpoint(base, delta, None, tmp_path / "edited")
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(p.name for p in out.glob("*.safetensors")) == shards
    for name in ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"]:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    with safe_open(out / shards[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    before, after = tensors_of(folder), tensors_of(out)
    for layer in range(base.n_layers):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        differs = (before.pop(name) != after.pop(name)).any(dim=0).nonzero().flatten().tolist()
        assert tuple(differs) == delta.mask.channels.get(layer, ())
    assert all(torch.equal(before[name], after[name]) for name in before | after)


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_removing_gives_the_base_back_bit_for_bit(base, delta, tmp_path, alpha):
    out = apply_to(base.name, delta, tmp_path / "edited", alpha=alpha)
    remove_from(out, delta, tmp_path / "again", alpha=alpha)
    for path in sorted(checkpoint_folder(base.name).glob("*.safetensors")):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert load_backbone(tmp_path / "again").fingerprint == base.fingerprint


def test_bfloat16_comes_back_though_the_edit_was_rounded(tmp_path):
    base = saved_llama(tmp_path / "base", dtype=torch.bfloat16)
    delta = tiny_delta(base, alpha=0.37)
    edited = apply_to(base.name, delta, tmp_path / "edited")
    assert_same_tensors(remove_from(edited, delta, tmp_path / "again"), tmp_path / "base")


def test_the_card_says_what_was_done_and_names_no_path_of_this_machine(base, delta, tmp_path):
    edited = export_checkpoint(base, delta, None, tmp_path / "edited")
    card = (edited / "README.md").read_text()
    for said in (
        "edited to refuse: crime", "alpha 1.7", f"fingerprint `{base.fingerprint}`", weights_sha256(delta),
        "| benign over refusal | 3/40 7.5 [2.6, 19.9] |", "n/a (n=0)", "paving circuit verify",
    ):  # fmt: skip
        assert said in card, said
    assert str(tmp_path) not in card and base.name not in card
    other = (export_checkpoint(base, delta, 0.5, tmp_path / "other") / "README.md").read_text()
    assert "alpha 0.5" in other
    assert "Benign over-refusal was not measured with this checkpoint" in other  # it was measured at another alpha
    unmeasured = export_checkpoint(base, with_metrics(delta, {}), None, tmp_path / "unmeasured") / "README.md"
    assert "Benign over-refusal was not measured with this checkpoint" in unmeasured.read_text()


def test_a_category_with_a_bar_in_its_name_stays_one_cell(base, tmp_path):
    card = export_checkpoint(base, tiny_delta(base, "crime | fraud"), None, tmp_path / "edited") / "README.md"
    assert "\n| crime \\| fraud | 1.7 |" in card.read_text()


def test_weights_in_other_formats_and_cards_of_the_base_stay_behind(base, delta, tmp_path):
    folder = shutil.copytree(base.name, tmp_path / "base")
    for name in ("README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "notes.md", "LICENSE.txt"):
        (folder / name).write_text("{}")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    out = apply_to(folder, delta, tmp_path / "edited")
    ours = {p.relative_to(out).as_posix() for p in out.rglob("*")}
    assert ours == {p.name for p in checkpoint_folder(base.name).iterdir()} | {"README.md", "LICENSE.txt"}


def test_the_fingerprint_of_the_files_is_that_of_the_loaded_model(any_backbone, tmp_path):
    folder = saved(any_backbone, tmp_path / "base")
    assert fingerprint_of_files(open_checkpoint(folder), tiny_delta(any_backbone)) == any_backbone.fingerprint


def test_files_of_gpt_2_without_the_models_prefix(tmp_path):
    base = gpt2_backbone()
    folder = saved(base, tmp_path / "base")
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    delta = tiny_delta(load_backbone(folder))
    assert delta.description.base.fingerprint == base.fingerprint
    edited = load_backbone(apply_to(folder, delta, tmp_path / "edited"))
    batch = batch_of(base, some_prompts())
    with delta.edit().apply(base, batch):
        assert torch.equal(logits_of(edited, batch), logits_of(base, batch))


def test_a_name_is_taken_only_where_one_fits():
    names = ["h.0.mlp.c_proj.weight", "h.1.mlp.c_proj.weight", "wte.weight"]
    assert stored_name(names, "transformer.h.1.mlp.c_proj.weight") == "h.1.mlp.c_proj.weight"
    assert stored_name(names, "transformer.h.2.mlp.c_proj.weight") is None  # not another layer's
    assert stored_name(names[:1], "transformer.h.1.mlp.c_proj.weight") is None
    assert stored_name([*names, "draft.h.1.mlp.c_proj.weight"], "model.h.1.mlp.c_proj.weight") is None
    assert stored_name(names, "lm_head.weight") is None


# Interrupted


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("no space left on device")], ids=["interrupt", "full disk"])
@pytest.mark.parametrize("during", ["_write", "write_card", "compared", "_finish"])
@pytest.mark.parametrize("way", ["apply", "remove"])
def test_an_interrupted_export_leaves_nothing(base, delta, tmp_path, monkeypatch, stop, during, way):
    source = base.name if way == "apply" else apply_to(base.name, delta, tmp_path / "edited")
    before = sorted(tmp_path.rglob("*"))

    def fails(*args, **kwargs):
        raise stop

    if way == "remove" and during in ("write_card", "compared"):
        during = "fingerprint_of_files"
    monkeypatch.setattr(checkpoints, during, fails)
    with pytest.raises((KeyboardInterrupt, CircuitError)):
        (apply_to if way == "apply" else remove_from)(source, delta, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("during", ["copying", "the proof"])
def test_a_killed_export_leaves_nothing_that_can_be_loaded(base, delta, tmp_path, monkeypatch, during):
    written = []

    def dies(source, to):
        written.append(to.write_bytes(source.read_bytes()))
        if len(written) > 6:
            os.kill(os.getpid(), signal.SIGKILL)

    if during == "copying":
        monkeypatch.setattr(checkpoints.shutil, "copyfile", dies)
    else:
        monkeypatch.setattr(checkpoints, "compared", lambda *_a, **_k: os.kill(os.getpid(), signal.SIGKILL))
    child = os.fork()  # cheaper than a new interpreter
    if child == 0:
        signal.alarm(60)
        try:
            apply_to(base.name, delta, tmp_path / "out")
        finally:
            os._exit(1)  # never back into pytest
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(".partial-out-") and list(partial.iterdir())
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(partial)
    with pytest.raises(CircuitError, match=r"config\.json is missing"):
        open_checkpoint(partial)
    monkeypatch.undo()
    apply_to(base.name, delta, tmp_path / "out")  # what is left behind is in nobody's way
    assert load_backbone(tmp_path / "out").n_layers == base.n_layers


# Bad input


def altered(base, folder, change):
    """A single-file copy of the base with its tensors changed."""
    saved(base, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refused(source, delta, tmp_path, says, act=apply_to, **kwargs):
    with pytest.raises(CircuitError, match=says):
        act(source, delta, tmp_path / "out", **kwargs)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".partial-*"))


DOWN = "model.layers.{}.mlp.down_proj.weight"


def test_an_existing_folder_is_not_overwritten(base, delta, tmp_path):
    (tmp_path / "out").mkdir()
    for act in (apply_to, remove_from):
        with pytest.raises(CircuitError, match="exists already"):
            act(base.name, delta, tmp_path / "out")


def test_another_base_is_refused(base, delta, tmp_path):
    refused(saved_llama(tmp_path / "b", seed=1).name, delta, tmp_path, "is not the base of this delta. It has fingerprint")
    # A change off the circuit, and one on it too small for the fingerprint's samples in bfloat16.
    other = altered(base, tmp_path / "c", lambda t: t["model.norm.weight"].add_(1))
    refused(other, delta, tmp_path, "no tensor of the circuit")
    channel = delta.mask.channels[2][0]

    def nudge(tensors):
        weight = tensors[DOWN.format(2)]
        weight[3, channel] = torch.nextafter(weight[3, channel], torch.tensor(9.0))

    refused(altered(base, tmp_path / "d", nudge), delta, tmp_path, DOWN.format(2) + " holds other weights")


def test_another_architecture_is_refused(delta, tmp_path):
    folder = saved(gpt2_backbone(), tmp_path / "base")
    refused(folder, delta, tmp_path, "has no tensor for model.layers.1.mlp.down_proj.weight")


def test_a_mask_that_does_not_fit_is_refused(base, delta, tmp_path):
    def narrow(tensors):
        tensors[DOWN.format(2)] = tensors[DOWN.format(2)][:, :40]

    refused(altered(base, tmp_path / "b", narrow), delta, tmp_path, "its channels do not fit")
    with pytest.raises(CircuitError, match="mask names"):
        Mask("neurons", 48, {1: (3, 48)})


def test_missing_tensors_are_refused(base, delta, tmp_path):
    for name in (DOWN.format(2), "model.layers.0.input_layernorm.weight"):
        folder = altered(base, tmp_path / name, lambda tensors, name=name: tensors.pop(name))
        refused(folder, delta, tmp_path, f"no tensor for {name}")


def test_tied_projections_are_refused(base, delta, tmp_path, monkeypatch):
    folder = altered(base, tmp_path / "b", lambda t: None)
    build = AutoModelForCausalLM.from_config

    def tied(config, **kwargs):
        model = build(config, **kwargs)
        model.model.layers[2].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", tied)
    refused(folder, delta, tmp_path, "is tied to another weight")


def test_another_dtype_is_refused(base, delta, tmp_path):
    folder = altered(base, tmp_path / "b", lambda t: t.update({n: v.bfloat16() for n, v in t.items()}))
    refused(folder, delta, tmp_path, "is stored as BF16 .* the delta was made in float32")


def test_quantised_bases_are_refused(base, delta, tmp_path):
    folder = altered(base, tmp_path / "b", lambda t: t.update({DOWN.format(1): t[DOWN.format(1)].to(torch.int8)}))
    refused(folder, delta, tmp_path, "is stored as I8")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    refused(folder, delta, tmp_path, "is quantised")


def test_an_unmerged_adapter_is_refused(base, delta, tmp_path):
    folder = altered(base, tmp_path / "b", lambda t: None)
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, delta, tmp_path, "holds an adapter")


def test_bases_that_are_not_whole_checkpoints_are_refused(base, delta, tmp_path):
    folder = shutil.copytree(base.name, tmp_path / "b")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    (shard, *_) = sorted(folder.glob("*.safetensors"))
    moved = {n: f for n, f in content["weight_map"].items() if n != DOWN.format(3)}
    index.write_text(json.dumps({**content, "weight_map": moved}))
    refused(folder, delta, tmp_path, "does not list the tensors that its files hold")
    index.write_text(json.dumps(content))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    refused(folder, delta, tmp_path, "missing or damaged")
    length = int.from_bytes(whole[:8], "little")
    first = next(iter(set(json.loads(whole[8 : 8 + length])) - {"__metadata__"}))
    twice = b'{"%s":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' % first.encode() + whole[9 : 8 + length]
    shard.write_bytes(len(twice).to_bytes(8, "little") + twice + whole[8 + length :])
    refused(folder, delta, tmp_path, "missing or damaged")
    shard.unlink()
    refused(folder, delta, tmp_path, "missing or damaged")
    for path in (*folder.glob("*.safetensors"), index):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, delta, tmp_path, r"only pytorch_model\.bin.*save_pretrained")
    (folder / "config.json").write_text('{"model_type": ')
    refused(folder, delta, tmp_path, r"config\.json cannot be read")


def test_a_base_that_is_nowhere_is_refused_without_a_download(delta, tmp_path):
    for nowhere in ("someone/some-model", str(tmp_path / "nowhere"), "tiny-llama"):
        with pytest.raises(CircuitError, match="there is no checkpoint folder"):
            export_checkpoint(nowhere, delta, None, tmp_path / "out")
    with pytest.raises(CircuitError, match="there is no checkpoint folder tiny-llama"):
        export_checkpoint(tiny_backbone(), delta, None, tmp_path / "out")


def test_removing_what_is_not_there_is_refused(base, delta, tmp_path):
    refused(base.name, delta, tmp_path, "holds the base's own weights", remove_from)
    edited = apply_to(base.name, delta, tmp_path / "edited")
    refused(edited, delta, tmp_path, "is edited with this delta already")
    refused(edited, tiny_delta(base, seed=5), tmp_path, r"is not base \+ 1\.7 \* delta", remove_from)
    refused(edited, delta, tmp_path, r"is not base \+ 1\.6 \* delta", remove_from, alpha=1.6)
    further = altered(load_backbone(edited), tmp_path / "further", lambda t: t["model.norm.weight"].add_(1))
    refused(further, delta, tmp_path, "weights off the circuit were changed too", remove_from)


def test_the_embedded_model_and_cached_hub_models_are_found_by_name(base, delta, tmp_path, monkeypatch):
    from paving.circuit import shards

    monkeypatch.setattr(shards, "embedded_checkpoint", lambda: checkpoint_folder(base.name))
    monkeypatch.setattr(shards, "snapshot_download", lambda name, local_files_only: base.name if local_files_only else None)
    for i, name in enumerate(("embedded:SmolLM2-135M-Instruct", "someone/some-model")):
        assert export_checkpoint(name, delta, None, tmp_path / str(i)).is_dir()
