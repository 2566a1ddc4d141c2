"""Is this checkpoint folder the base of a delta? Read from its files, one tensor at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from paving.backbone import Backbone
from paving.backbone.fingerprint import fingerprint_of
from paving.backbone.projections import ffn_outputs
from paving.backbone.weights import same_bits
from paving.circuit.delta import Delta
from paving.circuit.mask import CircuitError
from paving.circuit.shards import CONFIG, Checkpoint, checkpoint_folder, open_checkpoint, stored_name
from paving.circuit.slices import slice_of

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def circuit_tensors(checkpoint: Checkpoint, delta: Delta) -> dict[int, str]:
    """Layer -> the name under which the checkpoint holds its edited weight.

    raises CircuitError for quantised weights, an unmerged adapter, tensors that are missing, tied or of another dtype,
    and masks that do not fit
    """
    about, folder = delta.description, checkpoint.folder
    _check_plain(checkpoint)
    names: dict[int, str] = {}
    for line in about.layers:
        name = stored_name(checkpoint.tensors, line.parameter)
        if name is None:
            raise CircuitError(
                f"{folder} has no tensor for {line.parameter}, which the delta edits: the checkpoint is not whole, of "
                f"another architecture than {about.base.name}, or ties that weight to another."
            )
        if name in names.values():
            raise CircuitError(f"{folder} holds one tensor, {name}, for several layers: tied weights are not edited.")
        names[line.layer] = name
        stored = checkpoint.tensors[name]
        if stored.dtype not in DTYPES or str(DTYPES[stored.dtype]) != f"torch.{about.base.dtype}":
            raise CircuitError(
                f"{name} is stored as {stored.dtype} in {folder}, the delta was made in {about.base.dtype}. Quantised "
                "weights cannot be edited; for another float type make the delta on the base in its own dtype (`auto`)."
            )
        own = delta.base[line.layer].shape
        needed = [own[0], about.n] if about.reading == "neurons" else [about.n, own[1]]
        if list(stored.shape) != (needed[::-1] if line.transposed else needed):
            raise CircuitError(
                f"{name} is {'x'.join(map(str, stored.shape))} in {folder}, but the mask was made for {about.n} "
                f"{about.reading} and {needed[0]}x{needed[1]}: its channels do not fit. It belongs to another model."
            )
    return names


def _check_plain(checkpoint: Checkpoint) -> None:
    """raises CircuitError for quantised weights and an unmerged adapter"""
    folder, texts = checkpoint.folder, (checkpoint.config, checkpoint.config.get("text_config") or {})
    if any("quantization_config" in config for config in texts):
        raise CircuitError(f"{folder} is quantised, so it cannot be edited bit for bit. Give the unquantised checkpoint.")
    if (folder / "adapter_config.json").exists():
        raise CircuitError(f"{folder} holds an adapter that is added on loading. Merge it into the weights first.")


def why_not_exported(backbone: Backbone) -> str | None:
    """Why an edit of this model could not be written into its files, as far as their headers tell; None if it could."""
    try:
        checkpoint = open_checkpoint(checkpoint_folder(backbone.name))
        _check_plain(checkpoint)
        _without_weights(checkpoint.folder)
    except CircuitError as error:
        return str(error)
    for projection in ffn_outputs(backbone).values():
        name = stored_name(checkpoint.tensors, projection.parameter)
        stored = checkpoint.tensors[name].dtype if name is not None else None
        if DTYPES.get(stored) != projection.weight.dtype:
            return (
                f"{projection.parameter} is {str(projection.weight.dtype).removeprefix('torch.')} here, and "
                f"{stored or 'nothing of that name'} in {checkpoint.folder}. Load the model as its files hold it."
            )
    return None


def slices_of(checkpoint: Checkpoint, delta: Delta, names: Mapping[int, str]) -> Iterator[tuple[int, Tensor]]:
    """(layer, the slice that the checkpoint holds there), one after another."""
    for line in delta.description.layers:
        weight = checkpoint.read(names[line.layer])
        yield line.layer, slice_of(weight.t() if line.transposed else weight, delta.mask, line.layer).contiguous()


def first_difference(
    checkpoint: Checkpoint, names: Mapping[int, str], delta: Delta, wanted: Mapping[int, Tensor]
) -> str | None:
    """The first circuit tensor whose slice is not bit for bit the wanted one."""
    slices = slices_of(checkpoint, delta, names)
    return next((names[layer] for layer, own in slices if not same_bits(own, wanted[layer])), None)


def fingerprint_of_files(checkpoint: Checkpoint, delta: Delta | None = None, *, described: Path | None = None) -> str:
    """What Backbone.fingerprint would be, without loading the model: names from its configuration, weights from files.

    described  a folder whose config.json is read in place of the checkpoint's own, which is not there yet

    raises CircuitError for a folder that is no whole checkpoint, and where a weight that `delta` edits is tied to another
    """
    model = _without_weights(described or checkpoint.folder)
    tied = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    edited = {line.parameter for line in delta.description.layers} if delta is not None else set()
    parameters = {}
    for parameter, value in model.named_parameters():
        name = stored_name(checkpoint.tensors, parameter)
        if parameter in edited and tied[id(value)] > 1:
            raise CircuitError(f"{parameter} is tied to another weight in {checkpoint.folder}; an edit would change both.")
        if name is None or checkpoint.tensors[name].shape != tuple(value.shape):
            raise CircuitError(
                f"{checkpoint.folder} has no tensor for {parameter} ({'x'.join(map(str, value.shape))}), which {CONFIG} "
                "asks for: the checkpoint is not whole. Save or download it again."
            )
        parameters[parameter] = name
    return fingerprint_of(model, ((p, checkpoint.read(name)) for p, name in sorted(parameters.items())))


def _without_weights(folder: Path) -> nn.Module:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CircuitError(
            f"{folder / CONFIG} does not describe a model that transformers can build: "
            f"{str(error).splitlines()[0]} Models that need their own code are not supported here."
        ) from error
