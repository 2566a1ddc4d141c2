"""The shape of a residual controller, with the paper's values as defaults (Residual Paving, table 5)."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from paving.backbone import Backbone, BackboneError
from paving.controller.gate_machines import MachineShape

ROUTE_LAYERS = (1, 2, 3, 4)
CENTRES = (0.30, 0.55, 0.80)
WIDTHS = (0.15, 0.20, 0.15)
# A Gaussian tail below this is cut to exactly zero, so that an expert far outside its window costs nothing there.
WINDOW_FLOOR = 0.01


class ControllerConfig(BaseModel):
    """What is built; it never changes after training.

    route_layers   blocks whose outputs the router reads
    edit_layers    blocks whose outputs are edited; None: every block behind the last route layer (5 and on, by default)
    pooling        `last`: the last prompt token's state; `mean`: the mean over the prompt's tokens; `last+mean`: both
    n_experts      K bottleneck experts, each d -> d/bottleneck_ratio -> d
    activation     between an expert's two maps: `gelu`, or `none`: a low-rank linear map (table 14's capacity control)
    centres/widths each expert's Gaussian layer window, as fractions of the model's depth
    gain_clip      each expert's learned gain per layer is held in [0, gain_clip]
    router_hidden  hidden width of the router's MLP
    gate           the machines that decide in place of the router's own gate logit, where a search put them there
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    route_layers: tuple[int, ...] = ROUTE_LAYERS
    edit_layers: tuple[int, ...] | None = None
    pooling: Literal["last", "mean", "last+mean"] = "last"
    n_experts: int = Field(3, ge=1)
    activation: Literal["gelu", "none"] = "gelu"
    bottleneck_ratio: int = Field(8, ge=1)
    centres: tuple[float, ...] = CENTRES
    widths: tuple[float, ...] = WIDTHS
    gain_clip: float = Field(4.0, gt=0)
    router_hidden: int = Field(64, ge=1)
    gate: tuple[MachineShape, ...] = ()

    @model_validator(mode="after")
    def _windows_match_experts(self) -> Self:
        if not len(self.centres) == len(self.widths) == self.n_experts:
            raise ValueError(
                f"{self.n_experts} experts need as many window centres and widths; "
                f"got {len(self.centres)} centres and {len(self.widths)} widths."
            )
        if any(w <= 0 for w in self.widths):
            raise ValueError(f"window widths must be positive fractions of the depth; got {self.widths}.")
        if not self.route_layers or len(set(self.route_layers)) != len(self.route_layers):
            raise ValueError(f"route_layers must name at least one layer, each once; got {self.route_layers}.")
        if self.edit_layers is not None and (
            not self.edit_layers or list(self.edit_layers) != sorted(set(self.edit_layers))
        ):
            raise ValueError(f"edit_layers must be increasing and not empty; got {self.edit_layers}.")
        return self

    def resolved(self, backbone: Backbone) -> Self:
        """The same configuration with edit layers spelled out and every layer checked against the backbone."""
        backbone.check_layers(self.route_layers, "route")
        edit = self.edit_layers
        if edit is None:
            edit = tuple(range(max(self.route_layers) + 1, backbone.n_layers))
            if not edit:
                raise BackboneError(
                    f"no layer is left to edit after route layer {max(self.route_layers)}: {backbone.name} has layers "
                    f"0..{backbone.n_layers - 1}. Give lower route_layers or spell out edit_layers."
                )
        backbone.check_layers(edit, "edit")
        if backbone.d_model < self.bottleneck_ratio:
            raise BackboneError(f"bottleneck_ratio {self.bottleneck_ratio} exceeds the width {backbone.d_model}.")
        return self.model_copy(update={"edit_layers": edit})

    @property
    def reads_before_it_edits(self) -> bool:
        """True where every route layer lies below every edit layer, so one pass both decides and edits."""
        return self.edit_layers is not None and max(self.route_layers) < min(self.edit_layers)

    def n_features(self, d_model: int) -> int:
        """Width of the boundary feature: every route layer gives one state of the residual stream, or two."""
        return len(self.route_layers) * len(self.pooling.split("+")) * d_model

    def window(self, expert: int, layer: int, n_layers: int) -> float:
        """The expert's weight at a layer: a Gaussian over relative depth, its tail cut to exactly 0."""
        depth = layer / max(n_layers - 1, 1)
        value = math.exp(-0.5 * ((depth - self.centres[expert]) / self.widths[expert]) ** 2)
        return value if value >= WINDOW_FLOOR else 0.0


def windows(n_experts: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Centres and widths for any K: the paper's for K = 3, else spread evenly over the same range of depth."""
    if n_experts == len(CENTRES):
        return CENTRES, WIDTHS
    step = 0.6 / n_experts
    return tuple(0.25 + step * (k + 0.5) for k in range(n_experts)), (max(0.15, 0.45 / n_experts),) * n_experts
