"""How far the edit pushes the residual stream off the base's own path, layer by layer (Residual Paving, table 4)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from paving.backbone import Backbone, checked_ids
from paving.evaluation.diagnostics.forced import ForcedPrompts, LateStart
from paving.generation import batches_by_length
from paving.prompts.types import Prompt

Tick = Callable[[int], None]


@dataclass(frozen=True)
class BasePath:
    """One prompt, the base's own continuation forced on it.

    base, edited, moved   (n_layers) float64: root mean square over steps and features of H^0, H^I and H^I - H^0
    nll_base, nll_edited  mean nats per token of that continuation, without and with the intervention
    gate                  effective gate; where it is 0.0, edited is base, and moved is exactly 0
    """

    base: np.ndarray
    edited: np.ndarray
    moved: np.ndarray
    nll_base: float
    nll_edited: float
    gate: float

    def untouched(self) -> BasePath:
        """The same prompt with its gate closed: the base's path, bit for bit, without running it again."""
        return replace(self, edited=self.base, moved=np.zeros_like(self.moved), nll_edited=self.nll_base, gate=0.0)

    @property
    def rms(self) -> float:
        """Base-path RMS: of the displacement, over all listed layers, steps and features."""
        return float(np.sqrt((self.moved**2).mean()))


@torch.no_grad()
def base_paths(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    continuations: Mapping[str, tuple[int, ...]],
    interventions: Sequence[LateStart],
    layers: Sequence[int],
    *,
    batch_size: int = 8,
    tick: Tick | None = None,
) -> list[dict[str, BasePath]]:
    """For every intervention, prompt id -> its path along continuations[id]. The base's own pass serves all of them."""
    ids = {p.id: checked_ids(backbone, p) for p in prompts}
    found: list[dict[str, BasePath]] = [{} for _ in interventions]
    for chunk in batches_by_length(prompts, ids, batch_size):
        forced = [continuations[p.id] for p in chunk]
        batch = ForcedPrompts(backbone, chunk, [ids[p.id] for p in chunk])
        base = batch.run(forced, layers)
        for paths, intervention in zip(found, interventions, strict=True):
            edited = batch.run(forced, layers, intervention)
            moved = edited.states - base.states
            for i, p in enumerate(chunk):
                span = slice(0, len(forced[i]))
                paths[p.id] = BasePath(
                    base=_rms(base.states[i, :, span]),
                    edited=_rms(edited.states[i, :, span]),
                    moved=_rms(moved[i, :, span]),
                    nll_base=base.nll[i],
                    nll_edited=edited.nll[i],
                    gate=edited.gates[i],
                )
        if tick is not None:
            tick(len(chunk))
    return found


def stream_size(sizes: Sequence[np.ndarray]) -> np.ndarray:
    """(n_layers): root mean square over prompts of per-prompt RMS values, each (n_layers)."""
    return np.sqrt(np.mean(np.square(sizes), axis=0))


def relative_size(paths: Collection[BasePath]) -> np.ndarray:
    """(n_layers): the edit's size as a share of the base's stream, both RMS over the same prompts (at least one)."""
    return stream_size([p.moved for p in paths]) / stream_size([p.base for p in paths])


def _rms(states: Tensor) -> np.ndarray:
    """(n_layers, T, d) -> (n_layers)."""
    return states.double().pow(2).mean(dim=(1, 2)).sqrt().numpy()
