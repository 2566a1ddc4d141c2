"""A short, load-independent name for a base model's weights, so that a controller can refuse another base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from math import gcd

import torch
from torch import Tensor
from transformers import PreTrainedModel

from paving.backbone.layers import text_config
from paving.backbone.offload import parameters_in_order

SAMPLES_PER_TENSOR = 256
SHAPE_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def fingerprint(model: PreTrainedModel) -> str:
    """`2-` and SHA-256 (first 16 hex digits) over the configuration's shape and evenly spaced samples of every parameter.

    Samples are rounded to bfloat16 first, so the same checkpoint loaded in float32 or bfloat16 has the same
    fingerprint. Their spacing shares no factor with the length of a row, so that they fall into as many columns as there
    are samples: an edit of a few per cent of a matrix's columns or rows is seen. It tells one base from another; it does
    not prove that no weight was changed. (Without `2-` it is of a version that looked at a few columns alone.)
    """
    return fingerprint_of(model, parameters_in_order(model))


def outdated(recorded: str) -> str:
    """What to add to an error where a recorded fingerprint is of a version that looked at other weights."""
    return "" if recorded.startswith("2-") else " It was made by an earlier version of paving: make it again with this one."


def fingerprint_of(model: PreTrainedModel, parameters: Iterable[tuple[str, Tensor]]) -> str:
    """The same over (name, tensor) pairs in order of name; of `model` only the configuration is read."""
    digest = hashlib.sha256()
    config = text_config(model)
    digest.update(json.dumps({k: getattr(config, k, None) for k in SHAPE_KEYS}, sort_keys=True).encode())
    for name, parameter in parameters:
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES_PER_TENSOR)
        while parameter.ndim > 1 and gcd(step, parameter.shape[-1]) > 1:
            step -= 1
        sample = flat[::step][:SAMPLES_PER_TENSOR].to(device="cpu", dtype=torch.bfloat16).contiguous()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return f"2-{digest.hexdigest()[:16]}"
