"""What a circuit is measured against: the inverse and a random circuit, and AS, CAST and WS, each fitted on the same pairs.

Every row is fitted on the training pairs and its strength chosen on the calibration pairs by the rule that chooses α.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from paving.backbone import Backbone
from paving.circuit.mask import Choice, choose
from paving.circuit.pairs import Pair
from paving.circuit.slices import CircuitEdit
from paving.circuit_run.config import CircuitConfig
from paving.circuit_run.folder import load_circuit
from paving.circuit_run.inputs import openings_of
from paving.circuit_run.trained import edge_layers, trained_slices, within
from paving.intervention import Intervention
from paving.run import Means
from paving.run_folder import RunError
from paving.steering.activation_steering import fit_activation_steering
from paving.steering.behaviour import BehaviourConfig
from paving.steering.cast import fit_cast
from paving.steering.weight_delta import load_weight_delta, save_weight_delta
from paving.steering.weight_steering import WeightSteering, fit_weight_steering

At = Callable[[float], Intervention]
GAPS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)  # of the distance between compliance and refusal, for AS and CAST
FINER_GAPS = (0.01, 0.02, 0.03, 0.04)  # for AS, which has no condition: a twentieth of the way refuses benign prompts, too

WS_ALPHAS = (0.15, 0.25, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # every weight moves: less does as much


@dataclass(frozen=True)
class Fitted:
    """at: strength -> the row's intervention; strengths: those to be tried."""

    at: At
    strengths: tuple[float, ...]


@dataclass(frozen=True)
class Comparator:
    """fit: (backbone, config, training pairs, run folder, means) -> Fitted."""

    name: str
    fit: Callable[[Backbone, CircuitConfig, Sequence[Pair], Path, Means], Fitted]


def comparator(name: str) -> Comparator:
    """raises ValueError naming what is allowed."""
    found = next((c for c in COMPARATORS if c.name == name), None)
    if found is None:
        raise ValueError(f"the row {name!r} is not known; allowed: {', '.join(c.name for c in COMPARATORS)}.")
    return found


def _other_circuit(choice: Choice) -> Callable[..., Fitted]:
    """The same recipe on other channels: the bottom κ (the paper's inverse circuit), or a random draw of the same size."""

    def fit(backbone: Backbone, config: CircuitConfig, train: Sequence[Pair], folder: Path, means: Means) -> Fitted:
        own_mask, scores = load_circuit(folder, backbone.fingerprint)
        scores = within(scores, edge_layers(config, folder))
        reading, scope = config.attribution.reading, config.scope
        mask = choose(scores, reading, config.fraction, scope=scope, choice=choice, seed=config.seed)
        if mask.size != own_mask.size:
            raise RunError(
                f"{folder / 'circuit.json'} holds {own_mask.size} channels, where the run's settings choose {mask.size}: it "
                "is damaged. Find the circuit again in another folder."
            )
        name = "inverse" if choice == "bottom" else choice
        path = folder / "comparators" / f"{name}.safetensors"
        slices = trained_slices(path, backbone, config, train, mask, folder, means)
        return Fitted(lambda a: CircuitEdit(slices, a, name=name), config.strength.alphas)

    return fit


def _activation_steering(
    backbone: Backbone, config: CircuitConfig, train: Sequence[Pair], folder: Path, means: Means
) -> Fitted:
    fitted = fit_activation_steering(backbone, _texts(train), openings_of(config), _behaviour(config))
    return Fitted(lambda s: replace(fitted, strength=s), _of_the_gap(fitted.behaviour.gaps.values(), (*FINER_GAPS, *GAPS)))


def _conditional_steering(
    backbone: Backbone, config: CircuitConfig, train: Sequence[Pair], folder: Path, means: Means
) -> Fitted:
    fitted = fit_cast(backbone, _texts(train), openings_of(config), _behaviour(config))
    return Fitted(lambda s: replace(fitted, strength=s), _of_the_gap(fitted.behaviour.gaps.values()))


def _weight_steering(backbone: Backbone, config: CircuitConfig, train: Sequence[Pair], folder: Path, means: Means) -> Fitted:
    settings = config.weight_steering.model_copy(update={"seed": config.arithmetic.seed})
    path = folder / "comparators" / "ws.safetensors"
    if path.exists():
        delta = load_weight_delta(path, backbone)
    else:
        delta = fit_weight_steering(backbone, [p.harmful for p in train], openings_of(config), settings, say=means.say)
        save_weight_delta(delta, path)
    return Fitted(lambda a: WeightSteering(delta, a), WS_ALPHAS)


def _behaviour(config: CircuitConfig) -> BehaviourConfig:
    return BehaviourConfig(seed=config.arithmetic.seed)  # which opening each prompt gets, as for the fine-tunes


def _texts(pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    return [(p.harmful, p.benign) for p in pairs]


def _of_the_gap(gaps: Iterable[float], shares: Iterable[float] = GAPS) -> tuple[float, ...]:
    found = list(gaps)
    return tuple(share * sum(found) / len(found) for share in shares)


COMPARATORS = (
    Comparator("as", _activation_steering),
    Comparator("cast", _conditional_steering),
    Comparator("ws", _weight_steering),
    Comparator("inverse", _other_circuit("bottom")),
    Comparator("random", _other_circuit("random")),
)
