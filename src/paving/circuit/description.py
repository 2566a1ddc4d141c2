"""delta.json: everything about a delta that is not a tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from paving.circuit.mask import Reading
from paving.circuit.overlap import Overlap

FORMAT = 1
Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(_Part):
    """The model that a delta belongs to. fingerprint: Backbone.fingerprint. dtype: that of its FFN output projections."""

    name: str
    fingerprint: str
    dtype: Literal["float32", "bfloat16", "float16"]


class Layer(_Part):
    """One edited weight.

    parameter      its name in the model's state_dict (a checkpoint file may name it otherwise, see shards.stored_name)
    transposed     stored as (d_ff, d_model), as GPT-2's Conv1D does
    channels       how many channels of it are edited
    edited_sha256  of the slice base + alpha * delta, row by row in (d_model, d_ff) order, at the delta's own alpha
    """

    layer: int = Field(ge=0)
    parameter: str
    transposed: bool
    channels: int = Field(ge=1)
    edited_sha256: str


class Component(_Part):
    """The edit of one category.

    scores   S(u) of every channel, by layer, to four digits
    metrics  what was measured with this component alone, at its alpha; `harmful_refusal` and `benign_over_refusal` are
             rates (an object with k, n, rate, low, high). What is not there was not measured.
    recipe   how it was made: templates, kappa, training, seeds
    """

    category: str = Field(min_length=1)
    alpha: Alpha
    scores: dict[int, tuple[float, ...]] | None = None
    metrics: dict[str, JsonValue] = {}
    recipe: dict[str, JsonValue] = {}


class Composition(_Part):
    """overlap: what holds where circuits share a channel. metrics: as a component's, measured with all of them."""

    overlap: Overlap
    metrics: dict[str, JsonValue] = {}


class Description(_Part):
    """n: channels a layer has. components are sorted by category; composition is there if they are several."""

    format: Literal[1] = FORMAT
    method: Literal["c-delta-theta"] = "c-delta-theta"
    base: Base
    reading: Reading
    n: int = Field(ge=1)
    layers: tuple[Layer, ...] = Field(min_length=1)
    components: tuple[Component, ...] = Field(min_length=1)
    composition: Composition | None = None

    @model_validator(mode="after")
    def _one_meaning(self) -> Self:
        layers = [line.layer for line in self.layers]
        if layers != sorted(set(layers)):
            raise ValueError("layers must be sorted and each there once.")
        if len({line.parameter for line in self.layers}) < len(layers):
            raise ValueError("two layers name the same parameter: tied weights cannot be edited layer by layer.")
        categories = [c.category for c in self.components]
        if categories != sorted(set(categories)):
            raise ValueError(f"components must be sorted by category and each category there once; got {categories}.")
        if (len(categories) > 1) != (self.composition is not None):
            raise ValueError("several components need `composition`, one component has none.")
        for component in self.components:
            if any(len(scores) != self.n for scores in (component.scores or {}).values()):
                raise ValueError(f"scores of {component.category!r} must have {self.n} values a layer.")
        return self

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(c.category for c in self.components)

    @property
    def alpha(self) -> float:
        """1 for a composition, whose components have theirs folded in."""
        return self.components[0].alpha if self.composition is None else 1.0

    @property
    def metrics(self) -> dict[str, JsonValue]:
        """What was measured with the whole delta at its own alpha; empty where nothing was."""
        return self.components[0].metrics if self.composition is None else self.composition.metrics


class DeltaFile(Description):
    """delta.json itself: the description, and the SHA-256 of the delta.safetensors beside it."""

    weights_sha256: str


def public_name(name: str) -> str:
    """A base's name as it may travel with an artifact: a folder of this machine gives its last part only."""
    path = Path(name).expanduser()
    return path.resolve().name if path.is_absolute() or path.is_dir() or name.startswith(".") else name
