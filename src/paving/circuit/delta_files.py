"""Save and load a delta: delta.safetensors and delta.json in one folder, written whole, checked on loading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from paving.backbone.weights import tensor_sha256
from paving.circuit.delta import Delta, check_values, first_error
from paving.circuit.description import FORMAT, DeltaFile, Description
from paving.circuit.folders import whole_folder
from paving.circuit.mask import CircuitError, Mask
from paving.circuit.overlap import union
from paving.circuit.slices import SliceDelta

WEIGHTS_FILE, DESCRIPTION_FILE = "delta.safetensors", "delta.json"


def save_delta(delta: Delta, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write the folder `out`, or nothing.

    overwrite  replace a delta that is there; any other folder is left alone

    raises CircuitError if `out` exists and is not to be replaced, or cannot be written
    """
    out = Path(out)
    if overwrite and out.exists() and not (out / DESCRIPTION_FILE).is_file():
        raise CircuitError(f"{out} holds no delta, so it is not overwritten. Give another folder.")
    weights = _serialised(delta)
    about = DeltaFile(**dict(delta.description), weights_sha256=hashlib.sha256(weights).hexdigest())
    with whole_folder(out, overwrite=overwrite) as partial:
        (partial / WEIGHTS_FILE).write_bytes(weights)
        (partial / DESCRIPTION_FILE).write_text(about.model_dump_json(indent=1), encoding="utf-8")
    return out


def weights_sha256(delta: Delta) -> str:
    """SHA-256 of the delta.safetensors that saving writes."""
    return hashlib.sha256(_serialised(delta)).hexdigest()


def load_delta(folder: str | Path) -> Delta:
    """raises CircuitError for a missing, damaged or foreign file, another format, or contents that contradict themselves."""
    folder = Path(folder)
    about = read_description(folder)
    try:
        content = (folder / WEIGHTS_FILE).read_bytes()
    except OSError as error:
        raise CircuitError(f"{folder / WEIGHTS_FILE} cannot be read: {error}. Save or download the delta again.") from None
    found = hashlib.sha256(content).hexdigest()
    if found != about.weights_sha256:
        raise CircuitError(
            f"{folder / WEIGHTS_FILE} is damaged, or belongs to another {DESCRIPTION_FILE}: its SHA-256 is {found}, "
            f"{about.weights_sha256} was written. Save or download the delta again."
        )
    try:
        tensors = safetensors.torch.load(content)
        delta = _from_tensors(Description(**about.model_dump(exclude={"weights_sha256"})), tensors)
        edited = delta.edited()
    except (SafetensorError, CircuitError) as error:
        raise CircuitError(f"{folder} does not hold the delta that {DESCRIPTION_FILE} describes: {error}") from None
    for line in about.layers:
        if tensor_sha256(edited[line.layer]) != line.edited_sha256:
            raise CircuitError(
                f"{folder}: base + alpha * delta of layer {line.layer} is not what was written: alpha or the hash in "
                f"{DESCRIPTION_FILE} was changed. Save or download the delta again."
            )
    return delta


def read_description(folder: str | Path) -> DeltaFile:
    """delta.json of a folder. raises CircuitError if it is missing, damaged or of another format."""
    path = Path(folder) / DESCRIPTION_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CircuitError(
            f"{folder} holds no delta: {DESCRIPTION_FILE} is missing. Give a folder that `paving circuit edit` made."
        ) from None
    except (OSError, ValueError) as error:
        raise CircuitError(f"{path} cannot be read: {error}. Save or download the delta again.") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise CircuitError(f"{path} has format {found}; this version reads format {FORMAT}. Use the version that wrote it.")
    try:
        return DeltaFile.model_validate_json(json.dumps(content))  # JSON has lists and string keys; python input may not
    except ValidationError as error:
        raise CircuitError(f"{path} is damaged: {first_error(error)}") from None


def _serialised(delta: Delta) -> bytes:
    tensors: dict[str, Tensor] = {f"base.{layer}": own for layer, own in delta.base.items()}
    for i, part in enumerate(delta.parts):
        for layer, channels in part.mask.channels.items():
            tensors[f"components.{i}.channels.{layer}"] = torch.tensor(channels, dtype=torch.int32)
            tensors[f"components.{i}.delta.{layer}"] = part.values[layer]
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def _from_tensors(about: Description, tensors: Mapping[str, Tensor]) -> Delta:
    parts = tuple(_part(about, i, tensors) for i in range(len(about.components)))
    base = {line.layer: tensors[f"base.{line.layer}"] for line in about.layers if f"base.{line.layer}" in tensors}
    whole = union([part.mask for part in parts])
    channels = {line.layer: line.channels for line in about.layers}
    if channels != {layer: len(c) for layer, c in whole.channels.items()} or base.keys() != channels.keys():
        raise CircuitError("its layers, channels and base slices are not those described.")
    if len(tensors) != len(base) + 2 * sum(len(part.mask.channels) for part in parts):
        raise CircuitError("it holds tensors that no component names.")
    axis = 1 if about.reading == "neurons" else 0
    for layer, own in base.items():
        if own.dim() != 2 or own.shape[axis] != channels[layer] or str(own.dtype) != f"torch.{about.base.dtype}":
            raise CircuitError(f"the base's slice of layer {layer} is {tuple(own.shape)} {own.dtype}, which does not fit.")
    check_values(parts, base)
    return Delta(about, parts, base)


def _part(about: Description, i: int, tensors: Mapping[str, Tensor]) -> SliceDelta:
    kinds: dict[str, dict[int, Tensor]] = {"channels": {}, "delta": {}}
    for kind, found in kinds.items():
        prefix = f"components.{i}.{kind}."
        found.update({int(n.removeprefix(prefix)): t for n, t in tensors.items() if n.startswith(prefix)})
    if not kinds["channels"] or kinds["channels"].keys() != kinds["delta"].keys():
        raise CircuitError(f"component {i} has no channels, or channels and values of different layers.")
    channels = {}
    for layer, index in sorted(kinds["channels"].items()):
        if index.dtype != torch.int32 or index.dim() != 1:
            raise CircuitError(f"the channels of layer {layer} are {tuple(index.shape)} {index.dtype}, not a list of int32.")
        channels[layer] = tuple(index.tolist())
    return SliceDelta(Mask(about.reading, about.n, channels), kinds["delta"])
