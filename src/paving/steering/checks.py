"""What every comparator checks before it touches a model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paving.backbone import Backbone, BackboneError


class SteeringError(ValueError):
    """A direction, delta or strength that cannot be used as it is; the message says what, and how to mend it."""


def check_strength(strength: float, what: str) -> None:
    """raises SteeringError unless strength is a finite number from 0 up"""
    if not math.isfinite(strength) or strength < 0:
        raise SteeringError(
            f"{what} is {strength}; it must be 0 or more. These methods stand here to add refusal: below 0 they would "
            "take it away from harmful requests."
        )


def check_base(backbone: Backbone, name: str, fingerprint: str, what: str) -> None:
    """raises BackboneError if `what` was fitted on another base"""
    if backbone.fingerprint != fingerprint:
        raise BackboneError(
            f"{what} was fitted on {name} (fingerprint {fingerprint}), but the model at hand is {backbone.name} "
            f"(fingerprint {backbone.fingerprint}). Load {name}, or fit on {backbone.name}."
        )


def check_unit(vector: Tensor, what: str) -> None:
    """raises SteeringError unless vector is (d_model,) float32 of length 1"""
    length = float(vector.norm())
    if vector.dim() != 1 or vector.dtype != torch.float32 or not math.isclose(length, 1.0, rel_tol=1e-4):
        raise SteeringError(
            f"{what} is {tuple(vector.shape)} {vector.dtype} of length {length:g}; it must be (d_model,) torch.float32 of "
            "length 1. Divide it by its norm."
        )
