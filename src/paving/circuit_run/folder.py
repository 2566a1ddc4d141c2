"""The run folder of a circuit: one configuration, the circuit found, the delta trained, what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from paving.backbone.fingerprint import outdated
from paving.circuit.mask import CircuitError, Mask
from paving.circuit_run.config import CircuitConfig
from paving.run_folder import RunError, difference, write_json


def read_circuit_config(folder: Path) -> CircuitConfig:
    path = folder / "config.json"
    if not path.exists():
        raise RunError(f"{folder} holds no config.json, so it is no circuit run. Start one: paving circuit find --help")
    try:
        return CircuitConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(
            f"{path} is damaged, of another version, or of a controller's run. ({type(error).__name__})"
        ) from error


def open_circuit_run(config: CircuitConfig, folder: Path) -> None:
    """Create the folder, or go on in one of this configuration. raises RunError otherwise; nothing is overwritten."""
    if (folder / "config.json").exists():
        there = read_circuit_config(folder)
        if there != config:
            raise RunError(
                f"{folder} belongs to another configuration ({difference(there, config)}). "
                "Give another --out folder; nothing was changed."
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} holds files but no config.json, so it is no circuit run. Give another --out folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config.model_dump(mode="json"))


def save_circuit(folder: Path, mask: Mask, scores: dict[int, Tensor], base_fingerprint: str) -> None:
    """raises RunError where what was made of another circuit is left: Δθ of its channels would be put on these"""
    left = [name for name in ("slices.safetensors", "strengths.json", "comparators", "delta") if (folder / name).exists()]
    if left:
        raise RunError(
            f"{folder} has no circuit.json, but {', '.join(left)}, made of a circuit that is gone. Find this one in another "
            "folder, or move them away."
        )
    write_json(
        folder / "circuit.json",
        {
            "base_fingerprint": base_fingerprint,
            "reading": mask.reading,
            "n": mask.n,
            "channels": {str(layer): list(c) for layer, c in mask.channels.items()},
            "scores": {str(layer): [float(f"{v:.6g}") for v in s.tolist()] for layer, s in scores.items()},
        },
    )


def load_circuit(folder: Path, base_fingerprint: str | None = None) -> tuple[Mask, dict[int, Tensor]]:
    """(mask, scores). raises RunError without a circuit, CircuitError for one of another base."""
    path = folder / "circuit.json"
    if not path.exists():
        raise RunError(f"{folder} has no circuit yet. Find it first: paving circuit find --out {folder} ...")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        mask = Mask(found["reading"], found["n"], {int(layer): tuple(c) for layer, c in found["channels"].items()})
        scores = {int(layer): torch.tensor(s, dtype=torch.float64) for layer, s in found["scores"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged. Find the circuit again in another folder: paving circuit find --help") from error
    if base_fingerprint not in (None, found["base_fingerprint"]):
        raise CircuitError(
            f"the circuit in {folder} was found on a base with fingerprint {found['base_fingerprint']}; this one has "
            f"{base_fingerprint}. Find the circuit of this base: paving circuit find --out ANOTHER_FOLDER ..."
            f"{outdated(found['base_fingerprint'])}"
        )
    return mask, scores
