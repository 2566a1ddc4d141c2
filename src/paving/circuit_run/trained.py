"""What a run trains, on its own circuit or on another of the same size: kept in the run folder, taken from there again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
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

    raises RunError for a file there that does not fit the mask
    """
    if path.exists():
        try:
            return SliceDelta(mask, {int(name): values for name, values in load_file(path).items()})
        except (SafetensorError, ValueError) as error:
            raise RunError(f"{path} is damaged ({error}). Remove it; the same command trains it again.") from error
    own = own_answers(backbone, config, train, folder, means)
    slices = weight_delta(backbone, train, mask, openings_of(config), config.arithmetic, own=own, watch=means.watch)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({str(layer): values.contiguous() for layer, values in slices.values.items()}, partial)
    partial.replace(path)
    return slices
