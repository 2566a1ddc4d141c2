"""Save and load a controller: safetensors plus JSON, tied to its base by fingerprint. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from paving.backbone import Backbone, BackboneError
from paving.backbone.fingerprint import outdated
from paving.controller.config import ControllerConfig
from paving.controller.conformal import as_reference
from paving.controller.gates import Closed, MixturePolicy, RouterMixture, SingleExpert, Uniform, mixture_policy
from paving.controller.residual_paving import ResidualPaving
from paving.controller.weights import ControllerWeights

WEIGHTS_FILE, CONFIG_FILE = "controller.safetensors", "controller.json"
FORMAT = 1
FIELDS = ("base", "config", "policy", "threshold", "mixture", "scale", "use_veto")
BASE_FIELDS = ("name", "fingerprint", "d_model", "n_layers")


class ControllerError(ValueError):
    """A controller folder that cannot be used; the message says why and what would do."""


def save_controller(controller: ResidualPaving, folder: Path, extra: Mapping[str, object] | None = None) -> Path:
    """Write controller.safetensors and controller.json into `folder`, each replaced as a whole."""
    if controller.policy.name in ("oracle", "open"):
        raise ControllerError(
            f"a controller is not saved with the {controller.policy.name} gate: it is a diagnostic, not a rule to "
            "deploy. Save it with soft, hard, thresholded or closed."
        )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in controller.weights.state_dict().items()}
    description = {
        "format": FORMAT,
        "method": "residual-paving",
        "base": {"name": controller.base_name, "fingerprint": controller.base_fingerprint, **_shape(controller)},
        "config": controller.config.model_dump(mode="json"),
        "policy": controller.policy.name,
        "threshold": controller.threshold,
        "mixture": _mixture_name(controller.mixture),
        "scale": controller.scale,
        "use_veto": controller.use_veto,
        **({"objectives": controller.objectives} if controller.objectives != "three" else {}),
        **({"reference": asdict(controller.reference)} if controller.reference is not None else {}),
        **(extra or {}),
    }
    save_file(tensors, folder / (WEIGHTS_FILE + ".partial"))
    (folder / (CONFIG_FILE + ".partial")).write_text(json.dumps(description, indent=1), encoding="utf-8")
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        (folder / (name + ".partial")).replace(folder / name)
    return folder


def load_controller(folder: str | Path, backbone: Backbone) -> ResidualPaving:
    """Load a controller for `backbone`.

    raises ControllerError for a missing or damaged file or another format, BackboneError for another base.
    """
    controller = read_controller(folder)
    if controller.base_fingerprint != backbone.fingerprint:
        raise BackboneError(
            f"{folder} was trained for {controller.base_name} (fingerprint {controller.base_fingerprint}), but the model at "
            f"hand is {backbone.name} (fingerprint {backbone.fingerprint}). Load {controller.base_name}, or train for "
            f"{backbone.name}.{outdated(controller.base_fingerprint)}"
        )
    controller.weights.to(backbone.device)
    return controller


def read_controller(folder: str | Path) -> ResidualPaving:
    """A controller by itself, on the CPU, for whoever holds its base to other proof. raises ControllerError"""
    description = read_description(folder)
    folder = Path(folder)
    base = description["base"]
    try:
        config = ControllerConfig.model_validate(description["config"])
        weights = ControllerWeights(config, base["d_model"], base["n_layers"])
        missing, unexpected = weights.load_state_dict(load_file(folder / WEIGHTS_FILE), strict=False)
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise ControllerError(
            f"{folder / WEIGHTS_FILE} does not hold the controller that {CONFIG_FILE} describes: "
            f"{str(error).splitlines()[0]} Save or download it again."
        ) from error
    missing = [m for m in missing if not m.endswith(".window")]  # computed, not stored
    if missing or unexpected:
        raise ControllerError(f"{folder / WEIGHTS_FILE} lacks {missing} and has unknown {unexpected}; save it again.")
    try:
        mixture = mixture_policy(description["mixture"])
        reference = as_reference(description["reference"]) if "reference" in description else None
        controller = ResidualPaving(
            name="learned+veto" if description["use_veto"] else "learned",
            config=config,
            weights=weights,
            base_name=base["name"],
            base_fingerprint=base["fingerprint"],
            policy=Closed(),
            mixture=mixture,
            scale=description["scale"],
            use_veto=description["use_veto"],
            reference=reference,
            objectives=description.get("objectives", "three"),
        )
        policy = controller.policy_named(description["policy"], description["threshold"])
    except ValueError as error:
        raise ControllerError(f"{folder / CONFIG_FILE} cannot be used: {error}") from error
    weights.eval().requires_grad_(False)
    return replace(controller, policy=policy)


def check_deployable(controller: ResidualPaving) -> None:
    """raises ControllerError for a controller that was fitted to be measured beside others, and not to be used."""
    if controller.objectives == "two":
        raise ControllerError(
            f"the controller for {controller.base_name} was fitted without harmful keeps (two objectives), so nothing holds "
            "back what it edits: it can be evaluated by transformers and compared, not exported or served. Train with "
            "three objectives for that."
        )


def read_description(folder: str | Path) -> dict:
    """controller.json of a folder. raises ControllerError if it is missing, damaged or of another format."""
    path = Path(folder) / CONFIG_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ControllerError(
            f"{folder} holds no controller: {CONFIG_FILE} is missing. Give a run's controller folder."
        ) from None
    except (OSError, ValueError) as error:
        raise ControllerError(f"{path} cannot be read: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else None
        raise ControllerError(f"{path} has format {found}; this version reads format {FORMAT}.")
    base = description.get("base")
    missing = [key for key in FIELDS if key not in description]
    if not missing and not (isinstance(description["policy"], str) and isinstance(description["threshold"], int | float)):
        raise ControllerError(f"{path} names no gate policy and threshold, so it is damaged. Save or download it again.")
    missing += [f"base.{key}" for key in BASE_FIELDS if not isinstance(base, dict) or key not in base]
    if missing:
        raise ControllerError(f"{path} lacks {', '.join(missing)}, so it is damaged. Save or download it again.")
    return description


def _shape(controller: ResidualPaving) -> dict[str, int]:
    d_model = controller.weights.experts.w_out.shape[-1]
    return {"d_model": d_model, "n_layers": controller.weights.experts.n_layers}


def _mixture_name(mixture: MixturePolicy) -> str:
    match mixture:
        case RouterMixture():
            return "router"
        case Uniform():
            return "uniform"
        case SingleExpert(expert=k):
            return f"expert:{k}"
    raise ControllerError(f"a mixture of type {type(mixture).__name__} has no name to be saved under.")


def fresh_controller(backbone: Backbone, config: ControllerConfig, seed: int, mixture: str = "router") -> ResidualPaving:
    """An untrained controller for a backbone: weights drawn by seed, edits zero, gate undecided.

    raises ValueError for a mixture that is not known, of an expert that is not there, and for gate machines
    """
    if config.gate:
        raise ValueError("gate machines are not trained with a controller but searched for one; leave `gate` out.")
    config = config.resolved(backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = ControllerWeights(config, backbone.d_model, backbone.n_layers)
    return ResidualPaving(
        name="untrained",
        config=config,
        weights=weights.to(backbone.device),
        base_name=backbone.name,
        base_fingerprint=backbone.fingerprint,
        mixture=checked_mixture(mixture, config.n_experts),
    )


def checked_mixture(name: str, n_experts: int) -> MixturePolicy:
    mixture = mixture_policy(name)
    mixture.mix(torch.zeros(1, n_experts))  # an expert that does not exist is refused here and not in mid-run
    return mixture
