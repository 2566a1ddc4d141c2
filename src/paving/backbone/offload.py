"""A base larger than its device: what does not fit stands in main memory, then on disk, and comes in block by block.

Placed by accelerate (`device_map="auto"`). Every block computes on one device, so that what reads and edits residual states
sees it as it sees any base. In training the blocks that gradients pass through stay on the device until the step is done.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from paving.backbone.layers import BackboneError

OFFLOAD = "offload"


def is_offload(device: str) -> bool:
    return device.partition(":")[0] == OFFLOAD


def placement(device: str) -> dict[str, Any]:
    """`offload`, or `offload:20GiB` with what weights may take on the device -> options of `from_pretrained`.

    The device is the first accelerator, or main memory where there is none, and then the rest stands on disk.

    raises BackboneError where accelerate is missing, or the size cannot be read
    """
    try:
        from accelerate.utils import convert_file_size_to_int, get_max_memory
    except ImportError as error:
        raise BackboneError(
            f"--device {device} needs accelerate, which is not installed: pip install 'accelerate>=1.0'."
        ) from error
    memory = get_max_memory()
    place = next((p for p in (0, "mps") if p in memory), "cpu")
    room = {p: memory[p] for p in (place, "cpu") if p in memory}  # where memory is shared, it is counted once
    _, colon, size = device.partition(":")
    if colon:
        try:
            room[place] = convert_file_size_to_int(size)
        except ValueError as error:
            raise BackboneError(f"--device {device}: {size!r} is no size. Write for example {OFFLOAD}:20GiB.") from error
    return {"device_map": "auto", "max_memory": room, "offload_folder": tempfile.mkdtemp(prefix="paving-offload-")}


def forget_with(model: nn.Module, folder: str) -> None:
    """What was put on disk goes with the model."""
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)


def device_of(module: nn.Module) -> torch.device:
    """Where a module with weights of its own computes."""
    weight = next(module.parameters(recurse=False))
    if not weight.is_meta:
        return weight.device
    device = module._hf_hook.execution_device
    return torch.device(f"{torch.accelerator.current_accelerator()}:{device}" if isinstance(device, int) else device)


def is_offloaded(model: nn.Module) -> bool:
    return any(p.is_meta for p in model.parameters())


def parameters_in_order(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of every parameter in order of name, each brought in for as long as it is looked at."""
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.is_meta:
            yield name, parameter
            continue
        from accelerate.utils import align_module_device

        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        with align_module_device(module):
            yield name, getattr(module, own)
