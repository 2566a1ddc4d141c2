"""The one arithmetic of every edit of weights, and the bits that edits are held to."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def edited(base: Tensor, delta: Tensor, alpha: float) -> Tensor:
    """θ0 + α·Δθ in float64, rounded once to the base's dtype: two elementwise operations, the same bits everywhere."""
    wide = float64(base)
    change = delta.to(wide.device).double() * alpha
    return (wide + change).to(base.dtype).to(base.device)


def float64(tensor: Tensor) -> Tensor:
    """In float64, where the tensor is; on the CPU from an Apple GPU, which has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of the elements' bytes, row by row."""
    return hashlib.sha256(as_bytes(tensor)).hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal shape, dtype and bits: NaN equals itself, and 0.0 is not -0.0."""
    return one.shape == other.shape and one.dtype == other.dtype and as_bytes(one) == as_bytes(other)
