"""A comparator of a few lines, and what its tests share."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paving.backbone.hooks import edit_residuals
from paving.compare import Method
from paving.steering.row_edits import adding, row_edit

SCALES = (0.5, 1.0, 4.0)


@dataclass(frozen=True)
class AddAt:
    vector: Tensor
    layer: int = 2

    @contextmanager
    def editing(self, backbone, batch, strength):
        with edit_residuals(backbone, {self.layer: row_edit(adding(self.vector), strength, batch, "answer")}):
            yield


@dataclass
class Fitted:
    """Counts the fits: nothing is to be fitted where everything is on disk."""

    seed: int = 3
    materials: list = field(default_factory=list)

    def __call__(self, shop):
        self.materials.append(shop.material)
        vector = torch.randn(shop.backbone.d_model, generator=torch.Generator().manual_seed(self.seed))
        return AddAt(vector)


def stand_in(name="stand-in", fit=None, **changes) -> Method:
    return Method(name, fit or Fitted(), **{"scales": SCALES, "note": "made up for a test", **changes})
