"""What changed between base and edited checkpoint, proved from the files alone: tensor by tensor, with hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from paving.backbone.weights import same_bits
from paving.circuit.card import CARD_FILE
from paving.circuit.delta import Delta
from paving.circuit.delta_files import load_delta
from paving.circuit.description import Layer
from paving.circuit.folders import file_sha256
from paving.circuit.mask import CircuitError
from paving.circuit.shards import (
    CONFIG,
    INDEX,
    Checkpoint,
    belongs_beside,
    checkpoint_folder,
    open_checkpoint,
    read_json,
    stored_name,
)
from paving.circuit.slices import slice_of

Verdict = Literal[
    "unchanged",
    "edited as the delta says",
    "changed outside the circuit",
    "not base + alpha * delta",
    "base differs from the delta's",
    "only in one checkpoint",
    "other shape or dtype",
]
GOOD = ("unchanged", "edited as the delta says")
# Compared by meaning, without the fields that transformers writes by itself on saving.
CONFIGS = (CONFIG, "generation_config.json")
WRITTEN = ("_name_or_path", "transformers_version")
# Files that a checkpoint may have or lack without loading differently.
INERT = (CARD_FILE, ".gitattributes", ".gitignore")


@dataclass(frozen=True)
class TensorLine:
    """One tensor. changed: elements whose bits differ (0.0 and -0.0 do); None where they cannot be compared."""

    name: str
    sha256_base: str | None
    sha256_edited: str | None
    changed: int | None
    verdict: Verdict


@dataclass(frozen=True)
class FileLine:
    """One file that holds no weights. ok: equal, or of no account for loading."""

    name: str
    sha256_base: str | None
    sha256_edited: str | None
    ok: bool


@dataclass(frozen=True)
class Verification:
    """What the files show. alpha: the one the circuit was checked at, None if the delta could not be read.

    values    elements of all tensors of the base
    circuit   elements that the delta may change
    findings  everything that contradicts "base + alpha * delta, and nothing else changed"; empty if that holds
    """

    base: str
    edited: str
    delta: str
    alpha: float | None
    values: int
    circuit: int
    tensors: tuple[TensorLine, ...]
    files: tuple[FileLine, ...]
    findings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.findings

    @property
    def changed(self) -> int:
        return sum(line.changed or 0 for line in self.tensors)

    def as_json(self) -> dict:
        return {"ok": self.ok, "changed": self.changed, **asdict(self)}


def verify(
    base: str | Path,
    edited: str | Path,
    delta: str | Path,
    *,
    alpha: float | None = None,
    tick: Callable[[int], None] | None = None,
) -> Verification:
    """Is `edited` exactly base + alpha * delta, and everything else of it the base's?

    base, edited  checkpoint folders (the base also by name, as in `checkpoint_folder`)
    delta         a delta's folder
    alpha         the delta's own if None
    tick          called with the bytes of every tensor that is done

    Weights are compared as bits, whatever the shards; no model is built and one tensor at a time is held. A damaged file
    is a finding. raises CircuitError only where a folder is not there, or alpha is no alpha.
    """
    folder, edited, delta = checkpoint_folder(base), Path(edited), Path(delta)
    for path in (edited, delta):
        if not path.is_dir():
            raise CircuitError(f"there is no folder {path}. Give base, edited checkpoint and delta, in this order.")
    shown = (str(base), str(edited), str(delta))
    findings: list[str] = []
    opened = [_opened(open_checkpoint, path, findings) for path in (folder, edited)]
    loaded = _opened(load_delta, delta, findings)
    if loaded is None or None in opened:
        return Verification(*shown, None, 0, 0, (), (), tuple(findings))
    alpha = loaded.checked_alpha(alpha)
    tensors, files, found = compared(*opened, loaded, alpha, tick)
    findings += found
    values = sum(stored.numel for stored in opened[0].tensors.values())
    circuit = sum(own.numel() for own in loaded.base.values())
    return Verification(*shown, alpha, values, circuit, tensors, files, tuple(findings))


def compared(
    base: Checkpoint,
    edited: Checkpoint,
    delta: Delta,
    alpha: float,
    tick: Callable[[int], None] | None = None,
    *,
    without: Collection[str] = (),
) -> tuple[tuple[TensorLine, ...], tuple[FileLine, ...], tuple[str, ...]]:
    """(a line a tensor, a line a file, what contradicts) of two checkpoints that are open. tick as `verify`'s

    without  files that are not there yet, and are not looked at
    """
    findings: list[str] = []
    tensors = _tensors(base, edited, delta, alpha, findings, tick or (lambda _: None))
    return tensors, _files(base, edited, findings, without), tuple(findings)


def _opened(read: Callable, path: Path, findings: list[str]):
    try:
        return read(path)
    except CircuitError as error:
        findings.append(str(error))
        return None


def _tensors(
    base: Checkpoint, edited: Checkpoint, delta: Delta, alpha: float, findings: list[str], tick: Callable[[int], None]
) -> tuple[TensorLine, ...]:
    wanted = delta.edited(alpha)
    circuit: dict[str, Layer] = {}
    for layer in delta.description.layers:
        name = stored_name(base.tensors, layer.parameter)
        if name is None or name in circuit:
            findings.append(f"{layer.parameter}: the delta edits it, but the base has no tensor of its own for it")
        else:
            circuit[name] = layer
    lines = []
    for name in sorted(base.tensors.keys() | edited.tensors.keys()):
        line = _compared(base, edited, name)
        if name in circuit and line.changed is not None:
            line = replace(line, verdict=_circuit_verdict(base, edited, name, delta, circuit[name], wanted))
        if line.verdict not in GOOD:
            findings.append(f"{name}: {line.verdict}")
        lines.append(line)
        stored = base.tensors.get(name) or edited.tensors[name]
        tick(stored.end - stored.start)
    return tuple(lines)


def _compared(base: Checkpoint, edited: Checkpoint, name: str) -> TensorLine:
    """Hashes of both, and how many elements differ, in one pass over the bytes."""
    one, other = base.tensors.get(name), edited.tensors.get(name)
    if one is None or other is None:
        return TensorLine(name, _sha256(base, name), _sha256(edited, name), None, "only in one checkpoint")
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return TensorLine(name, _sha256(base, name), _sha256(edited, name), None, "other shape or dtype")
    hashes, changed = (hashlib.sha256(), hashlib.sha256()), 0
    size = max(1, (one.end - one.start) // max(1, one.numel))  # bytes an element; packed types count by bytes
    for a, b in zip(base.chunks(name), edited.chunks(name), strict=True):
        hashes[0].update(a)
        hashes[1].update(b)
        if a != b:
            differ = np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8)
            changed += int(differ.reshape(-1, size).any(axis=1).sum())
    sums = [h.hexdigest() for h in hashes]
    return TensorLine(name, *sums, changed, "unchanged" if sums[0] == sums[1] else "changed outside the circuit")


def _circuit_verdict(
    base: Checkpoint, edited: Checkpoint, name: str, delta: Delta, at: Layer, wanted: Mapping[int, Tensor]
) -> Verdict:
    """Of a tensor that the delta edits and that both have in one shape and dtype."""
    mask, layer, slice_base = delta.mask, at.layer, delta.base[at.layer]
    own, written = (c.read(name).t() if at.transposed else c.read(name) for c in (base, edited))  # (d_model, d_ff)
    neurons = mask.reading == "neurons"
    if tuple(own.shape) != ((slice_base.shape[0], mask.n) if neurons else (mask.n, slice_base.shape[1])):
        return "base differs from the delta's"
    if not same_bits(slice_of(own, mask, layer), slice_base):
        return "base differs from the delta's"
    differs = _bits(own) != _bits(written)
    if differs.index_fill_(1 if neurons else 0, mask.index(layer), False).any():
        return "changed outside the circuit"
    as_said = same_bits(slice_of(written, mask, layer), wanted[layer])
    return "edited as the delta says" if as_said else "not base + alpha * delta"


def _bits(tensor: Tensor) -> Tensor:
    """The elements as integers: floats compare equal where bits do not (0.0, -0.0) and differ where they do (NaN)."""
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _sha256(checkpoint: Checkpoint, name: str) -> str | None:
    if name not in checkpoint.tensors:
        return None
    digest = hashlib.sha256()
    for chunk in checkpoint.chunks(name):
        digest.update(chunk)
    return digest.hexdigest()


def _files(base: Checkpoint, edited: Checkpoint, findings: list[str], without: Collection[str]) -> tuple[FileLine, ...]:
    """Everything but tensors: configurations by their meaning, all else by hash."""
    headers = [{json.dumps(m, sort_keys=True) for m in c.headers.values()} for c in (base, edited)]
    if headers[0] != headers[1]:
        findings.append("weight files: the metadata in their headers differs")
    if base.headers.keys() == edited.headers.keys() and base.index != edited.index:
        findings.append(f"{INDEX}: its metadata differs")
    lines = []
    for name in sorted((_beside(base) | _beside(edited)) - set(without)):
        paths = [c.folder / name for c in (base, edited)]
        sums = [file_sha256(path) if path.is_file() else None for path in paths]
        ok = sums[0] == sums[1] or name in INERT
        if not ok and name in CONFIGS and None not in sums:
            ok = _same_meaning(*paths)
        elif sums[1] is None:
            ok = ok or not belongs_beside(name)  # weights in other formats are not part of an edited checkpoint
        if not ok:
            how = "differs" if None not in sums else f"only in the {'base' if sums[1] is None else 'edited checkpoint'}"
            findings.append(f"{name}: {how}")
        lines.append(FileLine(name, *sums, ok))
    return tuple(lines)


def _beside(checkpoint: Checkpoint) -> set[str]:
    """Every file of the folder that holds no weights of the checkpoint, by its path in there.

    Not what lies in hidden folders: `hf download` keeps notes of its own in .cache, git its history in .git, and nothing is
    loaded from them.
    """
    held = {*checkpoint.headers, *([INDEX] if checkpoint.index is not None else [])}
    found = (p.relative_to(checkpoint.folder) for p in checkpoint.folder.rglob("*") if p.is_file())
    shown = (path for path in found if not any(part.startswith(".") for part in path.parts[:-1]))
    return {name for path in shown if (name := path.as_posix()) not in held}


def _same_meaning(one: Path, other: Path) -> bool:
    try:
        return _meaning(read_json(one)) == _meaning(read_json(other))
    except CircuitError:
        return False  # damaged, and not equal by hash


def _meaning(config: object) -> object:
    if isinstance(config, Mapping):
        return {key: _meaning(value) for key, value in config.items() if key not in WRITTEN}
    return config
