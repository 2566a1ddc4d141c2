"""A comparator: what it does to a row (its editor), and to which rows it does so (its routing), as one intervention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from paving.backbone import Backbone, PromptBatch
from paving.intervention import Decided, RowState
from paving.steering.checks import check_base, check_strength


class Editor(Protocol):
    """What a method does to the rows of a batch while the context is open; the model is left bit for bit as it was.

    strength  (n,) float32, from 0 (the base's bits) up
    """

    def editing(self, backbone: Backbone, batch: PromptBatch, strength: Tensor) -> AbstractContextManager[None]: ...


class Routing(Protocol):
    """Which rows are edited: a gate in [0, 1] each, decided before the first pass. Only `Labelled` may read batch.bucket."""

    @property
    def name(self) -> str: ...

    def route(self, backbone: Backbone, batch: PromptBatch) -> tuple[RowState, ...]: ...


@dataclass(frozen=True)
class Steered:
    """name: as it stands in tables and file names. scale: s, from 0 up; a row's strength is s times its gate."""

    name: str
    editor: Editor
    routing: Routing
    scale: float
    base_name: str
    base_fingerprint: str

    def __post_init__(self) -> None:
        check_strength(self.scale, "scale")

    @contextmanager
    def apply(self, backbone: Backbone, batch: PromptBatch) -> Iterator[Decided]:
        """raises BackboneError on another base than the one it was fitted on"""
        check_base(backbone, self.base_name, self.base_fingerprint, self.name)
        states = self.routing.route(backbone, batch)
        if not self.scale:
            states = tuple(replace(s, gate=0.0) for s in states)
        strength = self.scale * torch.tensor([s.gate for s in states])
        if not bool(strength.any()):  # nothing is hooked or written: the base's bits
            yield Decided(states)
            return
        with self.editor.editing(backbone, batch, strength):
            yield Decided(states)
