"""Everything that decides the outcome of a circuit run."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field, field_validator

from paving.backbone import EMBEDDED
from paving.circuit.arithmetic import ArithmeticConfig
from paving.circuit.attribution import AttributionConfig
from paving.circuit.mask import Scope
from paving.circuit.objective import Reference
from paving.evaluation.judges.named import judge_line
from paving.generation import Decoding
from paving.steering.weight_steering import WeightSteeringConfig


class StrengthConfig(BaseModel):
    """The search for α on the calibration split.

    limit           most benign over-refusal, a fraction (the paper's mean: 4.2 %), held as (refused + 1) / (n + 1)
    max_new_tokens  None decodes what the run decodes: shorter answers hide what breaks later in them
    enough          over-refusal beyond which no larger α is tried
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    alphas: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
    limit: float = Field(0.042, ge=0, le=1)
    max_new_tokens: int | None = Field(None, ge=1)
    enough: float = Field(0.5, ge=0, le=1)

    @field_validator("alphas")
    @classmethod
    def _positive(cls, alphas: tuple[float, ...]) -> tuple[float, ...]:
        if not alphas or not all(math.isfinite(a) and a > 0 for a in alphas):
            raise ValueError("alphas must be positive and at least one; 0 is the base.")
        return tuple(sorted(set(alphas)))


class CircuitConfig(BaseModel):
    """Saved as config.json; a folder belongs to one configuration.

    pairs        JSON lines with a benign column and one column a category (paving.circuit.pairs)
    held_out     further such pairs, for evaluation only
    also_benign  further prompts that are not to be refused, such as safe ones that look unsafe: a prompt file, a dataset, or
                 `starter` (those that come with the package). A fifth of their groups chooses α with the pairs' benign
                 side; of the others the retain term keeps the base's own answers
    others_limit at most so many held-out prompts of every other category and source; None: as held_out_limit
    limit        at most so many pairs of `pairs`; calibration of them choose α, the rest find the circuit and train
    attributed   how many training pairs the attribution reads
    fraction     κ, of the channels of a layer or of all (scope)
    edges        take channels only from layers whose FFN stands in the greedy edge-level circuit of so many edges
    edge_pairs   how many training pairs that circuit is found on
    weight_steering  the fine-tunes of the comparator WS: at a rate meant for slices, all weights together would break
    own_tokens   length of the base's own benign answers in the retain term
    seed         of the split, the references and the random circuit; arithmetic.seed is that of every fine-tune and of
                 the openings drawn for it (--seed sets both)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = EMBEDDED
    dtype: str = "auto"
    pairs: str
    category: str
    benign: str = "base"
    held_out: str | None = None
    also_benign: str | None = None
    limit: int | None = Field(None, ge=2)
    calibration: int = Field(100, ge=1)
    held_out_limit: int | None = Field(None, ge=1)
    others_limit: int | None = Field(None, ge=1)
    openings: str | None = None
    reference: Reference = "after"
    attributed: int = Field(200, ge=1)
    attribution: AttributionConfig = AttributionConfig()
    fraction: float = Field(0.15, gt=0, le=1)
    scope: Scope = "layer"
    edges: int | None = Field(None, ge=1)
    edge_pairs: int = Field(20, ge=1)
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    weight_steering: WeightSteeringConfig = WeightSteeringConfig()
    own_tokens: int = Field(24, ge=1)
    strength: StrengthConfig = StrengthConfig()
    decoding: Decoding = Decoding(max_new_tokens=50)
    judge: str = "rules"
    seed: int = 0

    @classmethod
    def of_recipe(cls, recipe: str, **settings: object) -> CircuitConfig:
        """`published` or `selective`, for these pairs, category and whatever else is given: `paving circuit find --recipe`.

        raises ValueError naming what is allowed
        """
        return cls.model_validate(with_recipe(settings, recipe))

    @field_validator("judge")
    @classmethod
    def _judge_is_known(cls, line: str) -> str:
        return str(judge_line(line))


# What --recipe lays over a configuration, setting by setting. `published` is the paper's; `selective` keeps the base's
# benign answers while it learns to refuse, and leaves θ− out (how it was found: docs/circuits.md).
RECIPES: dict[str, dict] = {
    "published": {
        "fraction": 0.15,
        "scope": "layer",
        "edges": None,
        "attribution": AttributionConfig().model_dump(include={"reading", "steps", "path", "signed", "first"}),
        "arithmetic": ArithmeticConfig().model_dump(include={"retain", "learning_rate", "epochs", "minus"}),
        "strength": {"alphas": list(StrengthConfig().alphas)},
    },
    "selective": {
        "fraction": 0.06,
        "arithmetic": {"retain": "kl", "retain_weight": 2.0, "learning_rate": 2e-3, "epochs": 1, "minus": False},
        "own_tokens": 8,
        "strength": {"alphas": [0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 1.0, 1.25]},
    },
}


def with_recipe(content: dict, recipe: str) -> dict:
    """A configuration's content with a recipe laid over it, setting by setting: a batch size is no part of a recipe that
    only names a learning rate. raises ValueError naming what is allowed."""
    if recipe not in RECIPES:
        raise ValueError(f"the recipe {recipe!r} is not known; allowed: {', '.join(RECIPES)}.")
    laid = {k: {**content.get(k, {}), **v} if isinstance(v, dict) else v for k, v in RECIPES[recipe].items()}
    return content | laid
