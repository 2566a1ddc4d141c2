"""AS: one refusal vector a layer, added for every prompt alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from paving.backbone import Backbone, PromptBatch
from paving.intervention import Decided
from paving.steering.behaviour import Behaviour, BehaviourConfig, fit_behaviour
from paving.steering.checks import check_strength
from paving.steering.routing import Global
from paving.steering.states import Tick
from paving.steering.steered import Steered
from paving.training.openings import Openings


@dataclass(frozen=True)
class ActivationSteering:
    """h_l ← h_l + s · v_l at the behaviour's layers: CAST (arXiv 2409.05907) without its condition.

    strength  s, from 0 up, in residual units where the vectors have length 1 (see `Behaviour.gaps`); at 0 every bit is
              the base's
    """

    behaviour: Behaviour
    strength: float = 1.0
    name: str = "as"

    def __post_init__(self) -> None:
        check_strength(self.strength, "strength")

    @contextmanager
    def apply(self, backbone: Backbone, batch: PromptBatch) -> Iterator[Decided]:
        """raises BackboneError on another base than the one it was fitted on"""
        base = self.behaviour.base_name, self.behaviour.base_fingerprint
        with Steered(self.name, self.behaviour, Global(), self.strength, *base).apply(backbone, batch) as decided:
            yield decided


def fit_activation_steering(
    backbone: Backbone,
    pairs: Sequence[tuple[str, str]],
    openings: Openings,
    config: BehaviourConfig | None = None,
    *,
    tick: Tick | None = None,
) -> ActivationSteering:
    """pairs: (harmful, benign) request texts, of which the benign ones carry the openings. See `fit_behaviour`."""
    return ActivationSteering(fit_behaviour(backbone, [benign for _, benign in pairs], openings, config, tick=tick))
