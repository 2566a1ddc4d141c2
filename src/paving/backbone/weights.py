"""The one arithmetic of every edit of weights."""

from __future__ import annotations

from torch import Tensor


def edited(base: Tensor, delta: Tensor, alpha: float) -> Tensor:
    """θ0 + α·Δθ in float64, rounded once to the base's dtype: two elementwise operations, the same bits everywhere."""
    change = delta.to(base.device).double() * alpha
    return (base.double() + change).to(base.dtype)
