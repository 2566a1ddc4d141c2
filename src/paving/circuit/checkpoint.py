"""Edited checkpoints: a delta written into a base's files, and taken out again bit for bit (C-ΔΘ, the artifact)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from paving.backbone import Backbone
from paving.backbone.weights import as_bytes
from paving.circuit.base_files import circuit_tensors, fingerprint_of_files, first_difference
from paving.circuit.card import write_card
from paving.circuit.delta import Delta
from paving.circuit.delta_files import weights_sha256
from paving.circuit.folders import check_free, whole_folder
from paving.circuit.mask import CircuitError
from paving.circuit.shards import CONFIG, INDEX, Checkpoint, belongs_beside, checkpoint_folder, open_checkpoint, read_json
from paving.circuit.slices import write_slice
from paving.circuit.verify import compared

Tick = Callable[[int], None]


def export_checkpoint(
    base: Backbone | str | Path, delta: Delta, alpha: float | None, out: str | Path, *, tick: Tick | None = None
) -> Path:
    """The edited checkpoint of a base: an ordinary folder that plain transformers loads.

    base   a checkpoint folder, the embedded model, a Hugging Face id in the local cache, or a Backbone loaded by one of
           these names. The weights come from the files: what was changed in memory since is not in the export.
    alpha  the delta's own if None

    raises CircuitError as `apply_to` does; a model without files has to be saved with save_pretrained first.
    """
    folder = checkpoint_folder(base.name if isinstance(base, Backbone) else base)
    return apply_to(folder, delta, out, alpha=alpha, tick=tick)


def apply_to(
    folder: str | Path, delta: Delta, out: str | Path, *, alpha: float | None = None, tick: Tick | None = None
) -> Path:
    """Write base + alpha * delta to the new folder `out`, with config, tokenizer and a model card; `folder` stays as it is.

    Files are copied, then the circuit's tensors are written over in the copy, so names, shapes, shards, headers and every
    other byte of the weights are the base's. What was written is read again and proved as `verify` does before it takes
    its name. Memory: the delta and one tensor.

    tick  called with the bytes of every tensor that is proved
    raises CircuitError if `out` exists; if `folder` is not the delta's base, not whole, quantised or not in safetensors;
    if the delta does not fit it. Nothing is left at `out` then, nor when the process is stopped.
    """
    out, alpha = Path(out), delta.checked_alpha(alpha)
    check_free(out)
    checkpoint = open_checkpoint(folder)
    names = circuit_tensors(checkpoint, delta)
    edited = delta.edited(alpha)
    different = first_difference(checkpoint, names, delta, delta.base)
    if different and first_difference(checkpoint, names, delta, edited) is None:
        raise CircuitError(f"{folder} is edited with this delta already. Take it off first: paving circuit remove")
    own, found = delta.description.base, fingerprint_of_files(checkpoint, delta)
    if found != own.fingerprint or different:
        raise CircuitError(
            f"{folder} is not the base of this delta. It has fingerprint {found}, the delta is for {own.name} with "
            f"{own.fingerprint}; {different or 'no tensor of the circuit'} holds other weights. Give that base, unedited."
        )
    with whole_folder(out) as partial:
        _copy(checkpoint, partial)
        _write(checkpoint, partial, delta, names, edited)
        total = sum(stored.numel for stored in checkpoint.tensors.values())
        write_card(partial, delta, alpha, sha256=weights_sha256(delta), total=total)
        written = open_checkpoint(partial, checkpoint.config)
        _, _, findings = compared(checkpoint, written, delta, alpha, tick, without=(CONFIG,))
        if findings:
            raise CircuitError(
                f"what was written is not {folder} with this delta ({findings[0]}): files changed meanwhile, or the disk "
                "does not keep what it is given. Nothing is left of it; try again."
            )
        _finish(checkpoint, partial)
    return out


def remove_from(folder: str | Path, delta: Delta, out: str | Path, *, alpha: float | None = None) -> Path:
    """Write the base to the new folder `out` from a checkpoint that was edited with this delta: the circuit's weights bit
    for bit, from the delta, all else as `folder` has it.

    The model card is not brought back: the edited checkpoint does not hold the base's own.

    raises CircuitError if `out` exists, if the circuit of `folder` is not exactly base + alpha * delta, or if the other
    weights are not the base's, as far as its fingerprint tells
    """
    out, alpha = Path(out), delta.checked_alpha(alpha)
    check_free(out)
    checkpoint = open_checkpoint(folder)
    names = circuit_tensors(checkpoint, delta)
    different = first_difference(checkpoint, names, delta, delta.edited(alpha))
    if different and first_difference(checkpoint, names, delta, delta.base) is None:
        raise CircuitError(f"{folder} holds the base's own weights: this delta is not on it, so nothing can be removed.")
    if different:
        raise CircuitError(
            f"{different} of {folder} is not base + {alpha:g} * delta, so taking this delta off would not give the base "
            "back. It was edited with another delta or alpha, or changed since."
        )
    with whole_folder(out) as partial:
        _copy(checkpoint, partial)
        _write(checkpoint, partial, delta, names, delta.base)
        written = open_checkpoint(partial, checkpoint.config)
        own, found = delta.description.base, fingerprint_of_files(written, delta, described=checkpoint.folder)
        if found != own.fingerprint:
            raise CircuitError(
                f"without the delta {folder} has fingerprint {found}, but {own.name} has {own.fingerprint}: weights off the "
                "circuit were changed too, so what is left is not the base. Nothing was written."
            )
        _finish(checkpoint, partial)
    return out


def _copy(checkpoint: Checkpoint, to: Path) -> None:
    """Weights and what belongs to them, without config.json: nothing loads a folder that lacks it."""
    for source in sorted(p for p in checkpoint.folder.rglob("*") if p.is_file()):
        name = source.relative_to(checkpoint.folder).as_posix()
        wanted = name in checkpoint.headers or (name == INDEX and checkpoint.index is not None) or belongs_beside(name)
        if wanted and name != CONFIG:
            (to / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, to / name)


def _write(checkpoint: Checkpoint, to: Path, delta: Delta, names: Mapping[int, str], values: Mapping[int, Tensor]) -> None:
    """Put the values of the circuit's slices into the copied files, tensor by tensor, at the tensor's own bytes."""
    for line in delta.description.layers:
        stored = checkpoint.tensors[names[line.layer]]
        weight = checkpoint.read(stored.name).clone()
        write_slice(weight.t() if line.transposed else weight, delta.mask, line.layer, values[line.layer])
        with (to / stored.file).open("r+b") as file:
            file.seek(stored.start)
            file.write(as_bytes(weight))


def _finish(checkpoint: Checkpoint, to: Path) -> None:
    """Last, when all else is proved: nothing loads a folder without it."""
    shutil.copyfile(checkpoint.folder / CONFIG, to / CONFIG)
    if read_json(to / CONFIG) != checkpoint.config:
        raise CircuitError(f"{checkpoint.folder / CONFIG} changed while it was copied. Nothing was written; try again.")
