"""The proof from files: it holds for what we export, and one flipped bit anywhere is found and named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from paving.backbone import load_backbone
from paving.circuit import checkpoint as checkpoints
from paving.circuit import verify as module
from paving.circuit.base_files import circuit_tensors
from paving.circuit.checkpoint import apply_to, remove_from
from paving.circuit.compose import compose
from paving.circuit.delta_files import save_delta
from paving.circuit.mask import CircuitError
from paving.circuit.shards import open_checkpoint
from paving.circuit.verify import verify
from tiny_deltas import gpt2_backbone, saved, tiny_delta
from tiny_models import tiny_backbone

DOWN = "model.layers.{}.mlp.down_proj.weight"
flips = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Story:
    """Base, edited checkpoint and delta as folders."""

    def __init__(self, root, base, delta):
        self.base, self.delta_in_memory = base, delta
        self.base_folder = root / "base"
        self.delta = save_delta(delta, root / "delta")
        self.edited = apply_to(self.base_folder, delta, root / "edited")

    def verify(self, **how):
        return verify(self.base_folder, self.edited, self.delta, **how)


def told(root, backbone, reading="neurons", **how):
    base = load_backbone(saved(backbone, root / "base", **how))
    return Story(root, base, tiny_delta(base, reading=reading))


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """bfloat16, in shards. Read only: tests that change files put them back."""
    return told(tmp_path_factory.mktemp("story"), tiny_backbone(dtype=torch.bfloat16), max_shard_size="40KB")


@pytest.fixture
def single(tmp_path):
    """float32, one file; to be damaged."""
    return told(tmp_path, tiny_backbone())


@pytest.mark.parametrize(
    ("kind", "reading"),
    [("llama", "neurons"), ("llama", "outputs"), ("gpt2", "neurons"), ("gpt2", "outputs"), ("gemma3-multimodal", "neurons")],
)
def test_an_export_is_proved(tmp_path, kind, reading):
    backbone = gpt2_backbone() if kind == "gpt2" else tiny_backbone(kind)
    story = told(tmp_path, backbone, reading, max_shard_size="60KB")
    done = []
    report = story.verify(tick=done.append)
    assert report.ok and report.findings == ()
    delta = story.delta_in_memory
    edited = [line for line in report.tensors if line.verdict == "edited as the delta says"]
    assert len(edited) == len(delta.mask.channels) == 5
    assert all(line.sha256_base == line.sha256_edited for line in report.tensors if line.verdict == "unchanged")
    assert report.changed <= report.circuit == sum(own.numel() for own in delta.base.values())
    assert report.changed > 0.9 * report.circuit
    stored = open_checkpoint(story.base_folder).tensors.values()
    assert report.values == sum(t.numel for t in stored) and sum(done) == sum(t.end - t.start for t in stored)


def test_the_report_is_json(story):
    content = json.loads(json.dumps(story.verify().as_json()))
    assert content["ok"] is True and content["alpha"] == 1.7
    line = next(t for t in content["tensors"] if t["name"] == DOWN.format(1))
    assert line["changed"] > 0 and len(line["sha256_base"]) == 64 and line["sha256_base"] != line["sha256_edited"]
    assert {f["name"] for f in content["files"]} >= {"config.json", "tokenizer.json", "README.md"}


def test_no_model_is_built_and_weights_are_read_tensor_by_tensor(story, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a model was built")

    monkeypatch.setattr(torch.nn.Module, "__init__", never)
    monkeypatch.setattr("safetensors.torch.load_file", never)
    assert story.verify().ok


def test_a_composition_is_proved(story, tmp_path):
    both = compose([story.delta_in_memory, tiny_delta(story.base, "hate", seed=1, alpha=0.9)])
    folder = save_delta(both, tmp_path / "both")
    edited = apply_to(story.base_folder, both, tmp_path / "edited")
    assert verify(story.base_folder, edited, folder).ok
    findings = verify(story.base_folder, edited, story.delta).findings  # one of the two does not explain it
    assert any("changed outside the circuit" in f for f in findings)


def test_what_transformers_saves_again_in_one_file_is_proved_too(story, tmp_path):
    AutoModelForCausalLM.from_pretrained(story.edited).save_pretrained(tmp_path / "again")
    for name in ("generation_config.json", "config.json"):
        path = tmp_path / "again" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "transformers_version": "9.9"}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(story.edited / name, tmp_path / "again")
    assert [p.name for p in (tmp_path / "again").glob("*.safetensors")] == ["model.safetensors"]
    report = verify(story.base_folder, tmp_path / "again", story.delta)
    assert report.ok, report.findings


def test_another_alpha_must_be_said(story, tmp_path):
    weaker = apply_to(story.base_folder, story.delta_in_memory, tmp_path / "weaker", alpha=0.5)
    assert verify(story.base_folder, weaker, story.delta, alpha=0.5).ok
    report = verify(story.base_folder, weaker, story.delta)
    assert {f.split(": ")[1] for f in report.findings} == {"not base + alpha * delta"}
    assert len(report.findings) == 5


def test_the_removed_delta_is_the_base_again(story, tmp_path):
    again = remove_from(story.edited, story.delta_in_memory, tmp_path / "again")
    report = verify(again, story.edited, story.delta)
    assert report.ok, report.findings
    assert not verify(story.base_folder, again, story.delta).ok


def flipped(path, at, bit):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


@flips
@given(data=st.data(), side=st.sampled_from(["base", "edited"]), bit=st.integers(0, 7))
def test_a_flipped_bit_of_any_tensor_is_found_and_named(story, data, side, bit):
    checkpoint = open_checkpoint(story.base_folder if side == "base" else story.edited)
    stored = checkpoint.tensors[data.draw(st.sampled_from(sorted(checkpoint.tensors)))]
    at = data.draw(st.integers(stored.start, stored.end - 1))
    path = checkpoint.folder / stored.file
    flipped(path, at, bit)
    try:
        report = story.verify()
        assert not report.ok
        assert [f.split(":")[0] for f in report.findings] == [stored.name]
        (line,) = (t for t in report.tensors if t.verdict not in module.GOOD)
        assert line.name == stored.name
        assert line.changed == 1 or stored.name.endswith("down_proj.weight")
    finally:
        flipped(path, at, bit)
    assert story.verify().ok


@flips
@given(data=st.data(), side=st.sampled_from(["base", "edited", "delta"]), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_a_weight_file_is_found(story, data, side, bit):
    """Headers too: lengths, names, shapes, offsets, metadata, padding."""
    folder = {"base": story.base_folder, "edited": story.edited, "delta": story.delta}[side]
    path = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    at = data.draw(st.integers(0, header - 1) | st.integers(0, path.stat().st_size - 1))
    flipped(path, at, bit)
    try:
        report = story.verify()
        assert not report.ok
        assert side != "delta" or "delta.safetensors is damaged" in report.findings[0]
    finally:
        flipped(path, at, bit)
    assert story.verify().ok


def changed(folder, name, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name].clone()).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def put(value, at=(0, 0)):
    def change(tensor):
        tensor[at] = value
        return tensor

    return change


def test_bits_are_compared_and_not_floats(single):
    """0.0 against -0.0 is a change; equal NaNs are none."""
    off = next(c for c in range(48) if c not in single.delta_in_memory.mask.channels[2])
    for name, at in ((DOWN.format(2), (0, off)), ("model.embed_tokens.weight", (5, 5))):
        for folder in (single.base_folder, single.edited):
            changed(folder, name, put(float("nan"), at))
        assert single.verify().ok, name
        changed(single.base_folder, name, put(0.0, at))
        changed(single.edited, name, put(-0.0, at))
        assert single.verify().findings == (f"{name}: changed outside the circuit",)
        changed(single.edited, name, put(0.0, at))
        assert single.verify().ok


def test_a_base_that_is_not_the_deltas_is_named(single):
    channel = single.delta_in_memory.mask.channels[2][0]
    for folder in (single.base_folder, single.edited):
        changed(folder, DOWN.format(2), put(1.0, (0, channel)))
    assert single.verify().findings == (f"{DOWN.format(2)}: base differs from the delta's",)


def test_names_shapes_and_dtypes_are_compared(single):
    changed(single.edited, "model.norm.weight", lambda t: t.bfloat16())
    changed(single.edited, DOWN.format(1), lambda t: t.t())
    changed(single.edited, DOWN.format(0), lambda t: t.double())
    names = ("model.norm.weight", DOWN.format(1), DOWN.format(0))
    assert set(single.verify().findings) == {f"{name}: other shape or dtype" for name in names}


def test_tensors_on_one_side_only_are_named(single):
    path = single.edited / "model.safetensors"
    tensors = load_file(path)
    tensors["extra.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    report = single.verify()
    assert report.findings == (
        "extra.weight: only in one checkpoint",
        "model.norm.weight: only in one checkpoint",
    )
    assert next(t for t in report.tensors if t.name == "extra.weight").sha256_base is None


def test_files_beside_the_weights_are_compared(single):
    config = single.edited / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "transformers_version": "0.0", "_name_or_path": "x"}))
    (single.base_folder / "README.md").write_text("the base's card")
    (single.base_folder / "pytorch_model.bin").write_bytes(b"left behind by the export")
    assert single.verify().ok  # none of these says anything about the model
    config.write_text(json.dumps({**content, "rms_norm_eps": 0.5}))
    (single.edited / "tokenizer_config.json").write_text("{}")
    (single.edited / "generation_config.json").unlink()
    (single.edited / "adapter_config.json").write_text("{}")  # transformers would load it by itself
    report = single.verify()
    assert set(report.findings) == {
        "config.json: differs",
        "tokenizer_config.json: differs",
        "generation_config.json: only in the base",
        "adapter_config.json: only in the edited checkpoint",
    }
    assert {line.name: line.ok for line in report.files}["README.md"]


def test_what_a_download_or_git_keeps_in_hidden_folders_is_no_finding(single):
    for side in (single.base_folder, single.edited):
        for name in (".cache/huggingface/download/model.safetensors.metadata", ".git/config"):
            (side / name).parent.mkdir(parents=True, exist_ok=True)
            (side / name).write_text(str(side))
    assert single.verify().ok
    (single.edited / "more").mkdir()
    (single.edited / "more" / "modeling.py").write_text("")  # a folder in sight may be loaded from
    assert single.verify().findings == ("more/modeling.py: only in the edited checkpoint",)


def test_the_metadata_of_headers_and_index_is_compared(story, tmp_path):
    edited = shutil.copytree(story.edited, tmp_path / "edited")
    index = edited / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["metadata"]["total_size"] += 1
    index.write_text(json.dumps(content))
    shard = next(edited.glob("*.safetensors"))
    save_file(load_file(shard), shard, metadata={"format": "tf"})
    assert verify(story.base_folder, edited, story.delta).findings == (
        "weight files: the metadata in their headers differs",
        "model.safetensors.index.json: its metadata differs",
    )


def test_a_delta_of_another_architecture_is_a_finding(single, tmp_path):
    other = save_delta(tiny_delta(gpt2_backbone()), tmp_path / "other")
    findings = verify(single.base_folder, single.edited, other).findings
    assert any("the base has no tensor of its own for it" in f for f in findings)


def test_damaged_json_is_a_finding_with_the_files_name(single):
    for folder, name in ((single.edited, "config.json"), (single.delta, "delta.json")):
        content = (folder / name).read_text()
        (folder / name).write_text(content[:-3])
        report = single.verify()
        assert not report.ok and name in report.findings[0] and report.tensors == ()
        (folder / name).write_text(content)


def test_folders_that_are_not_there_are_an_error(single, tmp_path):
    for folders in (
        (tmp_path / "no", single.edited, single.delta),
        (single.base_folder, tmp_path / "no", single.delta),
        (single.base_folder, single.edited, tmp_path / "no"),
    ):
        with pytest.raises(CircuitError, match=r"no (checkpoint )?folder"):
            verify(*folders)
    with pytest.raises(CircuitError, match="alpha"):
        single.verify(alpha=-1)


def test_what_is_proved_is_what_transformers_loads(story):
    """The proof reads files; the loaded models must differ where it says, and nowhere else."""
    loaded = [AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (story.base_folder, story.edited)]
    differ = {n for n in loaded[0] if not torch.equal(loaded[0][n], loaded[1][n])}
    assert differ == {t.name for t in story.verify().tensors if t.changed}


@pytest.mark.parametrize("at", ["off the circuit", "on it"])
def test_what_was_not_written_as_the_delta_says_takes_no_name(tmp_path, monkeypatch, at):
    base = load_backbone(saved(tiny_backbone(), tmp_path / "base"))
    delta, write = tiny_delta(base), checkpoints._write

    def wrong(opened, to, *rest):
        write(opened, to, *rest)
        names = circuit_tensors(opened, delta)
        name = next(iter(names.values())) if at == "on it" else next(n for n in opened.tensors if n not in names.values())
        stored = opened.tensors[name]
        path = to / stored.file
        content = bytearray(path.read_bytes())
        content[stored.start] ^= 1  # one bit
        path.write_bytes(bytes(content))

    monkeypatch.setattr(checkpoints, "_write", wrong)
    with pytest.raises(CircuitError, match=r"is not .* with this delta \(.*(outside the circuit|not base \+)"):
        apply_to(base.name, delta, tmp_path / "edited")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
