"""Δθ = θ+ − θ− over all weights: what contrastive weight steering adds. Kept in memory, or in a cache of a benchmark."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paving.backbone import Backbone
from paving.steering.checks import SteeringError, check_base


@dataclass(frozen=True)
class WeightDelta:
    """values: parameter name -> θ+ − θ−, in the base's dtype. losses: mean loss per epoch of each fine-tune (nats)."""

    values: Mapping[str, Tensor]
    base_name: str
    base_fingerprint: str
    losses: Mapping[str, tuple[float, ...]]


def save_weight_delta(delta: WeightDelta, path: Path | str) -> None:
    """Keep a delta (as large as the base) so that a stopped benchmark need not fit it again. Replaced as one file.

    raises SteeringError where it cannot be written
    """
    path = Path(path)
    partial = path.with_suffix(".partial")
    about = {"base_name": delta.base_name, "base_fingerprint": delta.base_fingerprint, "losses": dict(delta.losses)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {name: value.detach().cpu().contiguous() for name, value in delta.values.items()}
        save_file(values, partial, metadata={"weight_steering": json.dumps(about)})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        raise SteeringError(f"cannot write the weight delta {path}: {error}. Free space, or give another file.") from error


def load_weight_delta(path: Path | str, backbone: Backbone) -> WeightDelta:
    """A delta as `save_weight_delta` left it.

    raises SteeringError for a file that is none; BackboneError for one of another base; FileNotFoundError
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weight delta {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["weight_steering"])
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        losses = {side: tuple(per_epoch) for side, per_epoch in about["losses"].items()}
        delta = WeightDelta(values, about["base_name"], about["base_fingerprint"], losses)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise SteeringError(f"{path} is no weight delta, or is damaged ({error}). Remove it and fit again.") from error
    check_base(backbone, delta.base_name, delta.base_fingerprint, f"the weight delta {path}")
    return delta
