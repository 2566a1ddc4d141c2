"""DIM: one refusal direction, the difference of two mean states, chosen by what taking it away and adding it does."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from paving.backbone import Backbone, checked_ids
from paving.prompts.types import Bucket, Prompt, SplitName
from paving.steering.ablation import Ablation
from paving.steering.addition import Addition
from paving.steering.checks import SteeringError
from paving.steering.dim_selection import Candidate, Limits, SelectionPrompts, choose, scored, wider, within
from paving.steering.directions import position_means, post_instruction_tokens
from paving.steering.material import Material
from paving.steering.orthogonal import Orthogonal
from paving.steering.refusal_score import RefusalTokens, prompt_scores, refusal_tokens
from paving.training.prepare import Stage, silent

KEEPS = (Bucket.HARMFUL_KEEP, Bucket.BENIGN_KEEP)


class DimConfig(BaseModel):
    """Which directions are candidates, and how one is chosen. Limits are the published ones.

    last_positions       candidates are read at the last so many of the tokens behind the instruction, or at all of them
                         where there are fewer; None: at all of them, as published. The default 3 is for the sake of time
    layer_step           every so manieth layer below the depth limit is a candidate; published: 1
    calibration_prompts  at most so many calibration prompts of either kind are scored, drawn by Material.seed; published: 32
    kl_limit             mean KL(base || ablated) on benign keeps at the first answer position, at most (nats)
    induced_limit        mean refusal score on benign keeps with the direction added, at least
    depth                the direction is added in front of a block within this part of the depth
    refusal_share        see `refusal_tokens`
    told_apart           directions are read of training harmful keeps that the base refuses and of benign keeps that it does
                         not, by the refusal score, as the published code filters its prompts, and calibration prompts are
                         filtered alike; a bucket of which fewer than `fewest` would be left is read whole (`Dim.read`)
    widen                where no direction keeps to the limits: the KL limit is doubled until one does, and if none does at
                         64 times, that on induced refusal is dropped and the KL limit begins anew; `Dim.limits` says which
                         held. Off: that is an error, as published
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    last_positions: int | None = Field(3, ge=1)
    layer_step: int = Field(1, ge=1)
    calibration_prompts: int = Field(32, ge=1)
    kl_limit: float = Field(0.1, ge=0)
    induced_limit: float = 0.0
    depth: float = Field(0.8, gt=0, le=1)
    refusal_share: float = Field(0.9, gt=0, le=1)
    told_apart: bool = True
    fewest: int = Field(16, ge=1)
    widen: bool = False
    batch_size: int = Field(16, ge=1)

    def limits(self) -> Limits:
        return Limits(self.kl_limit, self.induced_limit)


@dataclass(frozen=True)
class Dim:
    """r = mean state of harmful keeps − mean state of benign keeps, at one layer and token (arXiv 2406.11717).

    direction   r, (d_model,) float32, with its own length; r̂ is r / ‖r‖
    chosen      where r was read and what it does; `layer` is the block whose output that is. The published code numbers
                the same state layer + 1, by the block that reads it
    candidates  all that were scored, the chosen one among them
    limits      what it keeps to; wider than the configuration's only where `DimConfig.widen` asked for it
    tokens      what refusals are told by in the scores
    read        split and bucket -> (prompts that were read, how many the refusal score tells as wanted, how many there are)
    """

    direction: Tensor
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    limits: Limits
    tokens: RefusalTokens
    read: Mapping[str, tuple[int, int, int]]
    base_name: str
    base_fingerprint: str

    @property
    def unit(self) -> Tensor:
        return self.direction / self.direction.norm()

    def ablation(self) -> Ablation:
        return Ablation(self.unit)

    def orthogonal(self) -> Orthogonal:
        return Orthogonal(self.unit)

    def act_sub(self) -> Addition:
        """x ← x − s · r, away from refusal: Residual Paving's "benign-keep minus harmful-keep boundary direction"."""
        return Addition(-self.direction, self.chosen.layer)

    def act_add(self) -> Addition:
        """x ← x + s · r, towards refusal."""
        return Addition(self.direction, self.chosen.layer)


def fit_dim(backbone: Backbone, material: Material, config: DimConfig | None = None, *, stage: Stage = silent) -> Dim:
    """Directions from the training split's keeps; one is chosen on the calibration split.

    Reading takes one pass over each training keep, for all layers and tokens, and one more that tells which are read.
    Choosing takes, per candidate, an ablated pass over the benign calibration prompts, one with the direction added where
    that passed, and one over the edit prompts, which the base refuses, where both passed.

    raises SteeringError if no candidate keeps within the limits, naming how many failed each
    """
    config = config or DimConfig()
    tokens = refusal_tokens(material, config.refusal_share)
    train = _filtered(backbone, material, SplitName.TRAIN, KEEPS, tokens, config)
    directions = harmful_minus_benign(backbone, *(train[b].prompts for b in KEEPS), config)
    n_layers, n_positions, _ = directions.shape
    # The state behind block l is what block l + 1 reads; published layers are counted by the reader.
    layers = range(0, int(config.depth * n_layers) - 1, config.layer_step)
    if not layers:
        raise SteeringError(
            f"no block of {backbone.name} has one behind it within {config.depth:g} of its {n_layers} layers, where a "
            "direction could be added. Widen DimConfig.depth."
        )
    places = [(layer, position) for layer in layers for position in range(-n_positions, 0)]
    seen = _filtered(backbone, material, SplitName.CALIBRATION, (Bucket.EDIT, Bucket.BENIGN_KEEP), tokens, config)
    prompts = SelectionPrompts.rendered(
        backbone,
        refused=_drawn(seen[Bucket.EDIT].prompts, material.seed, config),
        benign=_drawn(seen[Bucket.BENIGN_KEEP].prompts, material.seed, config),
        batch_size=config.batch_size,
    )
    tick = stage("DIM: directions", len(places))
    candidates = [Candidate(layer, position) for layer, position in places]
    for limits in (config.limits(), *(wider(config.limits()) if config.widen else ())):
        for i, c in enumerate(candidates):
            candidates[i] = scored(backbone, directions[c.layer, c.position], c, prompts, tokens, limits)
            tick(limits == config.limits())
        if any(within(c, limits) for c in candidates):
            break
    chosen = choose(candidates, limits)
    vector = directions[chosen.layer, chosen.position].clone()
    parts = {f"training {b.value}": part for b, part in train.items()} | {
        f"calibration {b.value}": part for b, part in seen.items()
    }
    read = {name: (len(part.prompts), part.as_wanted, part.of) for name, part in parts.items()}
    return Dim(vector, chosen, tuple(candidates), limits, tokens, read, backbone.name, backbone.fingerprint)


class _Part(NamedTuple):
    """prompts: those that are read; as_wanted: how many score as the bucket should; of: how many there are."""

    prompts: tuple[Prompt, ...]
    as_wanted: int
    of: int


def _filtered(
    backbone: Backbone,
    material: Material,
    split: SplitName,
    buckets: Sequence[Bucket],
    tokens: RefusalTokens,
    config: DimConfig,
) -> dict[Bucket, _Part]:
    """See `DimConfig.told_apart`: benign keeps are to score below 0, all others above."""
    found = {}
    for bucket in buckets:
        prompts = material.of(split, bucket)
        if not config.told_apart:
            found[bucket] = _Part(prompts, len(prompts), len(prompts))
            continue
        scores = prompt_scores(backbone, prompts, tokens, batch_size=config.batch_size)
        wanted = tuple(p for p in prompts if (scores[p.id] < 0) == (bucket is Bucket.BENIGN_KEEP))
        found[bucket] = _Part(wanted if len(wanted) >= config.fewest else prompts, len(wanted), len(prompts))
    return found


def harmful_minus_benign(
    backbone: Backbone, harmful_keeps: Sequence[Prompt], benign_keeps: Sequence[Prompt], config: DimConfig
) -> Tensor:
    """(n_layers, n_positions, d_model) float32: [layer, -1] is read at the last prompt token."""
    harmful, benign = ([checked_ids(backbone, p) for p in prompts] for prompts in (harmful_keeps, benign_keeps))
    n_positions = post_instruction_tokens(harmful + benign)
    if config.last_positions is not None:
        n_positions = min(n_positions, config.last_positions)
    means = (position_means(backbone, rows, n_positions, batch_size=config.batch_size) for rows in (harmful, benign))
    return next(means) - next(means)


def _drawn(prompts: Sequence[Prompt], seed: int, config: DimConfig) -> list[Prompt]:
    return random.Random(seed).sample(prompts, min(config.calibration_prompts, len(prompts)))
