"""Comparators of a circuit run when they are needed: fitted once, at the strength that the limit chooses."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from paving.backbone import Backbone, PromptBatch
from paving.circuit.pairs import Pair
from paving.circuit_run.config import CircuitConfig
from paving.circuit_run.rows import Comparator, Fitted
from paving.circuit_run.stages import judged_by, kept_strengths, strengths_of
from paving.evaluation.judges import Judge
from paving.intervention import Applied
from paving.run import Means
from paving.traces.store import TraceStore
from paving.training.strength import Keep, StrengthPoint


class Fitting:
    """A comparator, fitted when first asked for: not at all where everything it would answer is on disk."""

    def __init__(
        self, other: Comparator, backbone: Backbone, config: CircuitConfig, train: Sequence[Pair], folder: Path, means: Means
    ):
        self.name, self.backbone, self.config, self.folder, self.means = other.name, backbone, config, folder, means
        self._fit = lambda: other.fit(backbone, config, train, folder, means)

    @cached_property
    def fitted(self) -> Fitted:
        self.means.say(f"fitting {self.name}")
        with torch.inference_mode(False), torch.enable_grad():  # whoever asks first may be measuring, without gradients
            return self._fit()


@dataclass(frozen=True)
class Deferred:
    """A fitted comparator at one strength, as an intervention."""

    name: str
    strength: float
    fitting: Fitting

    def apply(self, backbone: Backbone, batch: PromptBatch) -> AbstractContextManager[Applied]:
        return self.fitting.fitted.at(self.strength).apply(backbone, batch)


def points_of(
    fitting: Fitting, calibration: Sequence[Pair], judge: Judge | None, base: StrengthPoint
) -> Sequence[StrengthPoint]:
    """The comparator on the calibration pairs, strength by strength; kept in comparators/NAME.json."""

    def measure(known: Sequence[StrengthPoint], keep: Keep) -> Sequence[StrengthPoint]:
        found, config, means = fitting.fitted, fitting.config, fitting.means
        known = (base, *known)
        return strengths_of(fitting.backbone, config, calibration, found.at, found.strengths, means, judge, known, keep)

    path = fitting.folder / "comparators" / f"{fitting.name}.json"
    return kept_strengths(path, judged_by(fitting.config, judge), measure)


def recipe_key(config: CircuitConfig, name: str, strength: float) -> str:
    settings = config.model_dump(mode="json")
    if config.also_benign is None:  # a field of later: keys of runs without it stay what they were
        del settings["also_benign"]
    return TraceStore.key(config=settings, row=name, strength=strength)
