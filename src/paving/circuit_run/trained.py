"""What a run trains, on its own circuit or on another of the same size: kept in the run folder, taken from there again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paving.backbone import Backbone
from paving.circuit import edges
from paving.circuit.arithmetic import weight_delta
from paving.circuit.mask import CircuitError, Mask
from paving.circuit.pairs import Pair
from paving.circuit.slices import SliceDelta
from paving.circuit_run.config import CircuitConfig
from paving.circuit_run.inputs import openings_of, own_answers
from paving.run import Means
from paving.run_folder import RunError


def edge_layers(config: CircuitConfig, folder: Path) -> tuple[int, ...] | None:
    """The layers whose FFN stands in the run's edge-level circuit (edges.json); None where it asked for none."""
    return None if config.edges is None else edges.ffn_layers(edges.load_circuit(folder / "edges.json"))


def within(scores: Mapping[int, Tensor], layers: Collection[int] | None) -> dict[int, Tensor]:
    """raises CircuitError if the edge-level circuit leaves no layer to take channels from"""
    kept = {layer: s for layer, s in scores.items() if layers is None or layer in layers}
    if not kept:
        raise CircuitError("the edge-level circuit holds no FFN that channels could be taken from; ask for more edges.")
    return kept


def trained_slices(
    path: Path, backbone: Backbone, config: CircuitConfig, train: Sequence[Pair], mask: Mask, folder: Path, means: Means
) -> SliceDelta:
    """Δθ = θ+ − θ− (or θ+ − θ0) on the channels of `mask`, in `path`; taken from there if it is. θ− is never written.

    raises RunError for a file there that is damaged, or of other channels
    """
    if path.exists():
        return _kept_slices(path, mask)
    own = own_answers(backbone, config, train, folder, means)
    slices = weight_delta(backbone, train, mask, openings_of(config), config.arithmetic, own=own, watch=means.watch)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    tensors = {str(layer): values.contiguous() for layer, values in slices.values.items()}
    save_file(tensors, partial, metadata={"channels": _digest(mask)})
    partial.replace(path)
    return slices


def _kept_slices(path: Path, mask: Mask) -> SliceDelta:
    try:
        with safe_open(path, framework="pt") as file:
            channels = (file.metadata() or {}).get("channels", _digest(mask))  # a file of before says nothing of it
            values = {int(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        axis = 1 if mask.reading == "neurons" else 0
        widths = {layer: v.shape[axis] for layer, v in values.items()}
    except (SafetensorError, ValueError, IndexError) as error:
        raise RunError(f"{path} is damaged ({error}). Remove it; the same command trains it again.") from error
    if channels != _digest(mask) or widths != {layer: len(c) for layer, c in mask.channels.items()}:
        raise RunError(
            f"{path} was trained on other channels than this circuit's. Remove it; the same command trains it again."
        )
    return SliceDelta(mask, values)


def _digest(mask: Mask) -> str:
    return hashlib.sha256(json.dumps([mask.reading, mask.n, sorted(mask.channels.items())]).encode()).hexdigest()
