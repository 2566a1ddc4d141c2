"""How a controller is fitted, with the paper's values as defaults (Residual Paving, table 5)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from paving.controller.gates import mixture_policy
from paving.training.promise import PromiseConfig


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LossWeights(Frozen):
    """Weights of the loss terms; names follow section 3.3 and A.5."""

    ce: float = Field(2.0, ge=0)
    kl: float = Field(0.2, ge=0)
    trajectory: float = Field(0.25, ge=0)
    preservation: float = Field(1.0, ge=0)
    gate: float = Field(0.5, ge=0)
    harmful_preservation: float = Field(1.5, ge=0)  # multiplies `preservation` on harmful keeps
    harmful_margin: float = Field(0.25, ge=0)
    l2: float = Field(1e-4, ge=0)


class TrainingConfig(Frozen):
    """The staged schedule. A step's batch holds rows_per_step edit, benign keep and harmful keep prompts."""

    seed: int = 0
    gate_epochs: int = Field(10, ge=0)
    contrastive_epochs: int = Field(1, ge=0)
    stage_epochs: tuple[int, int, int] = (2, 4, 1)
    short_horizon: int = Field(4, ge=1)
    horizon: int = Field(12, ge=2)
    learning_rate: float = Field(3e-4, gt=0)
    contrastive_learning_rate: float = Field(3e-4, gt=0)
    gate_learning_rate: float = Field(1e-3, gt=0)
    gate_batch: int = Field(64, ge=1)
    rows_per_step: tuple[int, int, int] = (4, 2, 2)
    hard_negatives: int = Field(5, ge=1)
    margin: float = Field(1.0, gt=0)
    top_k: int = Field(1024, ge=2)
    train_scale: float = Field(1.0, gt=0)
    mixture: str = "router"  # what experts are fitted and deployed under: the router's weights, `uniform` or `expert:N`
    weights: LossWeights = LossWeights()
    targets: Literal["reframe", "own", "reference"] = "reframe"
    veto_l2: float = Field(0.1, ge=0)

    @field_validator("mixture")
    @classmethod
    def _mixture_is_known(cls, name: str) -> str:
        mixture_policy(name)
        return name


class CalibrationConfig(Frozen):
    """What the calibration split decides: scale, threshold, gate policy, veto (tables 5 and 7)."""

    scales: tuple[float, ...] = Field((1.0, 2.0, 4.0, 8.0, 16.0), min_length=1)
    policies: tuple[str, ...] = Field(("thresholded", "hard", "soft"), min_length=1)  # the most cautious first
    max_edit_prompts: int = Field(48, ge=1)
    harmful_cost: float = Field(1.5, gt=0)  # weight of a false activation on a harmful keep against a missed edit
    use_veto: bool = True
    promise: PromiseConfig | None = None  # raises the threshold until it holds; a gate that never closes can promise nothing

    @model_validator(mode="after")
    def _promised_gates_close(self) -> Self:
        never = [name for name in self.policies if name in ("soft", "open")]
        if self.promise is not None and never:
            raise ValueError(
                f"a promise needs a gate that closes below its threshold; leave {', '.join(never)} out of the policies, "
                "as in policies=('thresholded', 'hard')."
            )
        return self
