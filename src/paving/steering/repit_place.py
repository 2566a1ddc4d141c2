"""Where RepIt reads and edits: the block and token whose own direction, taken away there alone, takes most refusals away."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from paving.backbone import Backbone, checked_ids
from paving.prompts.types import Bucket, Prompt, SplitName
from paving.steering.checks import SteeringError
from paving.steering.dim_selection import SelectionPrompts, edited_logits, mean_score, moved
from paving.steering.directions import position_means, post_instruction_tokens
from paving.steering.material import Material
from paving.steering.refusal_score import RefusalTokens
from paving.steering.repit import LEFT_OVER, IsolatedDirection
from paving.training.prepare import Stage, silent


class PlaceConfig(BaseModel):
    """depth, kl_limit and last_positions (None: all tokens behind the instruction) are those of the published code, which
    scores by COSMIC where this scores by the first token of the answer.

    calibration_prompts  at most so many of either kind, drawn by Material.seed
    widen                how often the limit is doubled at most, where no place keeps to it; published: 0
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    last_positions: int | None = Field(None, ge=1)
    depth: float = Field(0.8, gt=0, le=1)
    kl_limit: float = Field(0.1, ge=0)
    calibration_prompts: int = Field(32, ge=1)
    widen: int = Field(6, ge=0)
    batch_size: int = Field(16, ge=1)


@dataclass(frozen=True)
class Place:
    """layer: the block whose output is read and edited; position: the token, -1 is the prompt's last.

    kl       mean KL(base || edited) on benign calibration prompts at the first answer position (nats)
    refusal  mean refusal score of the edit prompts under the edit: the lower, the better; None: not looked at
    limit    what kl keeps to
    """

    layer: int
    position: int
    kl: float
    refusal: float | None = None
    limit: float = math.inf


def best_place(
    backbone: Backbone,
    material: Material,
    tokens: RefusalTokens,
    config: PlaceConfig | None = None,
    *,
    stage: Stage = silent,
) -> Place:
    """Every block within `depth` and every token: mean(edit) − mean(benign) of training prompts, nothing isolated yet
    (ρ = 0), is taken away there, and the place of the lowest refusal score among those that keep to the limit is taken.

    raises SteeringError where none does
    """
    config = config or PlaceConfig()
    edit, benign = (
        [checked_ids(backbone, p) for p in material.of(SplitName.TRAIN, b)] for b in (Bucket.EDIT, Bucket.BENIGN_KEEP)
    )
    n_positions = post_instruction_tokens(edit + benign)
    if config.last_positions is not None:
        n_positions = min(n_positions, config.last_positions)
    target, centre = (position_means(backbone, rows, n_positions, batch_size=config.batch_size) for rows in (edit, benign))
    prompts = SelectionPrompts.rendered(
        backbone,
        refused=_drawn(material.of(SplitName.CALIBRATION, Bucket.EDIT), material.seed, config),
        benign=_drawn(material.of(SplitName.CALIBRATION, Bucket.BENIGN_KEEP), material.seed, config),
        batch_size=config.batch_size,
    )
    layers = range(
        max(1, int(config.depth * backbone.n_layers) - 1)
    )  # published layers are counted by the reader (`fit_dim`)
    tick = stage("RepIt: places", len(layers) * n_positions)
    editors: dict[tuple[int, int], IsolatedDirection] = {}
    found: dict[tuple[int, int], Place] = {}
    for layer in layers:
        for position in range(-n_positions, 0):
            editor = _naive(target[layer, position], centre[layer, position], layer)
            tick(1)
            if editor is not None:
                editors[layer, position] = editor
                found[layer, position] = Place(layer, position, moved(backbone, editor, prompts))
    for doubled in range(config.widen + 1):
        limit = config.kl_limit * 2**doubled
        within = [p for p in found.values() if p.kl <= limit]
        if within:
            edited = (edited_logits(backbone, editors[p.layer, p.position], prompts.refused) for p in within)
            scored = [replace(p, refusal=mean_score(part, tokens)) for p, part in zip(within, edited, strict=True)]
            return replace(min(scored, key=lambda p: p.refusal), limit=limit)
    raise SteeringError(
        f"none of {len(found)} places keeps benign prompts within a KL of {config.kl_limit * 2**config.widen:g} when the "
        "target's direction is taken away there. Give other prompts, or widen PlaceConfig.kl_limit."
    )


def _naive(target: Tensor, centre: Tensor, layer: int) -> IsolatedDirection | None:
    """None where the two means do not differ."""
    vector = (target - centre).double()
    length = vector.norm()
    if not length > LEFT_OVER * target.norm():
        return None
    unit = vector / length
    return IsolatedDirection(layer, unit.float(), float(centre.double() @ unit), 0.0, ())


def _drawn(prompts: Sequence[Prompt], seed: int, config: PlaceConfig) -> list[Prompt]:
    return random.Random(seed).sample(prompts, min(config.calibration_prompts, len(prompts)))
