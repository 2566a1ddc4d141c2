"""RepIt: the part of a target concept's refusal vector that other concepts do not share (arXiv 2509.13281)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from paving.backbone import Backbone, PromptBatch, checked_ids
from paving.backbone.hooks import edit_residuals
from paving.prompts.types import Bucket, Prompt, SplitName
from paving.steering.checks import SteeringError
from paving.steering.material import Material
from paving.steering.row_edits import ablating, row_edit
from paving.steering.states import Tick, tail_means
from paving.steering.steered import Editor

Score = Callable[[Editor], tuple[float, float]]
"""An editor, to be used at strength 1 -> (target success, non-target success) on calibration prompts, each in [0, 1]."""

REST = "(the rest)"

LEFT_OVER = 1e-4
"""Less of the target's length than this is taken for rounding: states are float32 or coarser, and a prompt's state varies
in its last bits with the rows that shared its batch."""


class RepItConfig(BaseModel):
    """rhos, refine and limit are those of the published code.

    rhos      share of the non-target energy that is taken out, tried first
    refine    at most so many more, where the non-target success crosses the limit between two of them
    limit     highest non-target success
    smallest  a non-target concept has at least so many prompts; those of smaller ones make one concept together
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rhos: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field((0.0, 0.33, 0.66, 0.99), min_length=1)
    refine: int = Field(3, ge=0, le=3)
    limit: float = Field(0.1, ge=0, le=1)
    smallest: int = Field(4, ge=1)
    batch_size: int = Field(16, ge=1)


@dataclass(frozen=True)
class Trial:
    """What one rho did: shares of calibration prompts, target (edit) and non-target (harmful keeps), no longer refused."""

    rho: float
    target: float
    non_target: float


@dataclass(frozen=True)
class IsolatedDirection:
    """x ← x − s (x·r̂ − c) r̂ at the output of one block, all positions: the published affine ablation at s = 1.

    unit          (d_model,) float32, of length 1, on the CPU
    concepts      the non-target ones
    level         c, the component along r̂ that the mean benign state has
    trials        every rho that was tried, in rising order
    within_limit  False where no rho kept to the limit: the one with the lowest non-target success was taken, as published

    Strengths from 0 to 1; beyond 1 the component overshoots the benign mean.
    """

    layer: int
    unit: Tensor
    level: float
    rho: float
    concepts: tuple[str, ...]
    trials: tuple[Trial, ...] = ()
    within_limit: bool = True

    @contextmanager
    def editing(self, backbone: Backbone, batch: PromptBatch, strength: Tensor) -> Iterator[None]:
        with edit_residuals(backbone, {self.layer: row_edit(ablating(self.unit, self.level), strength, batch)}):
            yield


def fit_repit(
    backbone: Backbone,
    material: Material,
    score: Score,
    *,
    layer: int,
    position: int = -1,
    config: RepItConfig | None = None,
    tick: Tick | None = None,
) -> IsolatedDirection:
    """Isolate v = mean(edit) − mean(benign) from the harmful keeps' vectors, as far as the calibration prompts want it.

    score     called once a rho; higher is better on the target, lower on the rest
    layer     the block whose output is read and edited (the published code reads and edits block inputs, l + 1)
    position  prompt token that is read, counted from the end: -1 is the last
    tick      called with how many more training prompts have been read

    rho is the one with the highest target success whose non-target success keeps to the limit; of equals the smallest.

    raises SteeringError where the target's vector lies in the span of the others, or a score is not in [0, 1]
    """
    config = config or RepItConfig()
    backbone.check_layers((layer,), "RepIt")
    vectors, benign = concept_vectors(backbone, material, layer=layer, position=position, config=config, tick=tick)
    target, others = vectors.pop(Bucket.EDIT.value), vectors

    def at(rho: float) -> IsolatedDirection:
        direction = isolate(target, torch.stack(list(others.values())), rho)
        length = direction.norm()
        if not length > LEFT_OVER * target.norm():
            raise SteeringError(
                f"at rho = {rho} next to nothing is left of the target's vector at layer {layer}: it lies in the span of "
                f"{len(others)} other concepts, or is zero. Take smaller rhos, another layer, or larger concepts."
            )
        unit = direction / length
        return IsolatedDirection(layer, unit.float(), float(benign @ unit), rho, tuple(others))

    def trial(rho: float) -> Trial:
        success = Trial(rho, *score(at(rho)))
        if not all(0 <= s <= 1 for s in (success.target, success.non_target)):
            raise SteeringError(f"at rho = {rho} the score gave {success}; both successes are shares between 0 and 1.")
        return success

    trials = [trial(rho) for rho in sorted(set(config.rhos))]
    trials += [trial(rho) for rho in refined(trials, config.limit, config.refine)]
    trials.sort(key=lambda t: t.rho)
    best, within = choose(trials, config.limit)
    return replace(at(best.rho), trials=tuple(trials), within_limit=within)


def isolate(target: Tensor, others: Tensor, rho: float) -> Tensor:
    """v − (1 − √(1 − ρ)) · P v, P projecting on the span of the non-target vectors: a share ρ of v's energy there is gone.

    target (d_model,), others (n_concepts, d_model), float64 -> (d_model,) float64

    The published pipeline whitens with C = WᵀW / n + λ I first, W the reweighted non-target vectors, and un-whitens after.
    C maps their span to itself and is λ on its complement, so what is orthogonal to the span is so in the whitened space
    too: weights, whitening and λ all cancel (see `published_pipeline` in the tests, which agrees to rounding).
    """
    span = torch.linalg.svd(others.T, full_matrices=False)
    tolerance = span.S.max() * max(others.shape) * torch.finfo(others.dtype).eps
    basis = span.U[:, span.S.gt(tolerance)]  # two concepts with one vector span one dimension, not two
    return target - (1 - math.sqrt(1 - rho)) * (basis @ (basis.T @ target))


def concept_vectors(
    backbone: Backbone,
    material: Material,
    *,
    layer: int,
    position: int,
    config: RepItConfig,
    tick: Tick | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """(concept -> mean state − mean benign state, mean benign state), each (d_model,) float64; `edit` is the target."""
    benign = material.of(SplitName.TRAIN, Bucket.BENIGN_KEEP)
    groups = {Bucket.EDIT.value: material.of(SplitName.TRAIN, Bucket.EDIT)}
    groups |= concepts(material.of(SplitName.TRAIN, Bucket.HARMFUL_KEEP), config.smallest)
    prompts = [*benign, *(p for rows in groups.values() for p in rows)]
    ids = [checked_ids(backbone, p) for p in prompts]
    shortest = min(map(len, ids))
    if not -shortest <= position < 0:
        raise SteeringError(
            f"position {position} is no token of every prompt: positions count from the end, -1 to -{shortest}."
        )
    # No token sees a later one, so the state at a position is the last state of the prompt cut there.
    cut = [row[: len(row) + 1 + position] for row in ids]
    states = tail_means(backbone, cut, [1] * len(cut), [layer], batch_size=config.batch_size, tick=tick)
    state = {p.id: z for p, z in zip(prompts, states[:, 0].double(), strict=True)}

    def mean(rows: Sequence[Prompt]) -> Tensor:
        return torch.stack([state[p.id] for p in rows]).mean(0)

    centre = mean(benign)
    return {name: mean(rows) - centre for name, rows in groups.items()}, centre


def concepts(prompts: Sequence[Prompt], smallest: int) -> dict[str, list[Prompt]]:
    """Non-target prompts by source, where there are several sources; by group otherwise. Small ones become one, `REST`."""
    by_source = len({p.source for p in prompts}) > 1
    found: dict[str, list[Prompt]] = defaultdict(list)
    for p in prompts:
        found[f"source {p.source}" if by_source else f"group {p.group}"].append(p)
    large = {name: rows for name, rows in found.items() if len(rows) >= smallest}
    rest = [p for name, rows in found.items() if name not in large for p in rows]
    return large | ({REST: rest} if rest else {})


def refined(trials: Sequence[Trial], limit: float, n: int) -> list[float]:
    """At most n rhos more, around where the non-target success first crosses the limit (the published secant), or none."""
    for one, two in pairwise(trials):
        if (one.non_target > limit) != (two.non_target > limit):
            crossing = one.rho + (limit - one.non_target) * (two.rho - one.rho) / (two.non_target - one.non_target)
            halves = [(one.rho + crossing) / 2, (crossing + two.rho) / 2]
            wanted = {0: [], 1: [crossing], 2: halves, 3: [crossing, *halves]}[n]
            return [rho for rho in dict.fromkeys(round(w, 2) for w in wanted) if rho not in {t.rho for t in trials}]
    return []


def choose(trials: Sequence[Trial], limit: float) -> tuple[Trial, bool]:
    """(the trial that is taken, whether it keeps to the limit)."""
    within = [t for t in trials if t.non_target <= limit]
    if within:
        return max(within, key=lambda t: (t.target, -t.rho)), True
    return min(trials, key=lambda t: (t.non_target, -t.target, t.rho)), False
