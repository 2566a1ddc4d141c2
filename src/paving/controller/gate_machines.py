"""A gate of kernel machines in place of the router's own logit: one for each kind of prompt that the gate must close on.

The router's mixture stays as it was trained; only the decision whether to edit is taken over.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

Kernel = Literal["rbf", "linear"]
UNLIKE = "unlike"  # prompts that are like none which the gate was fitted on


class MachineShape(BaseModel):
    """closes_on: what the machine tells edit prompts from: a kind of keep, or prompts unlike those it was fitted on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    closes_on: Literal["harmful_keep", "benign_keep", "unlike"]
    kernel: Kernel | Literal["nearest"]
    n_columns: int = Field(ge=1)
    n_support: int = Field(ge=1)


class Machine(nn.Module):
    """f(x) = Σ_i coef_i k(support_i, x) + bias on standardised columns of the boundary feature; slope · (f − threshold).

    k is exp(−gamma |a − b|²), or a·b where the kernel is linear; where it is `nearest`, f(x) = −min_i |support_i − x| and
    nothing else. Above 0 the prompt is taken for an edit prompt.
    """

    def __init__(self, shape: MachineShape):
        super().__init__()
        self.kernel = shape.kernel
        self.register_buffer("columns", torch.zeros(shape.n_columns, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(shape.n_columns))
        self.register_buffer("std", torch.ones(shape.n_columns))
        self.register_buffer("support", torch.zeros(shape.n_support, shape.n_columns))
        self.register_buffer("coef", torch.zeros(shape.n_support))
        for name, value in (("gamma", 1.0), ("bias", 0.0), ("threshold", 0.0), ("slope", 1.0)):
            self.register_buffer(name, torch.tensor(value))

    def score(self, z: Tensor) -> Tensor:
        """(n, n_features) -> (n,): f, before the threshold."""
        x = (z.float()[:, self.columns] - self.mean) / self.std
        if self.kernel == "linear":
            return x @ (self.coef @ self.support) + self.bias
        if self.kernel == "nearest":
            return -torch.cdist(x, self.support).amin(1)
        return torch.exp(-self.gamma * torch.cdist(x, self.support).square()) @ self.coef + self.bias

    def forward(self, z: Tensor) -> Tensor:
        return self.slope * (self.score(z) - self.threshold)


class GateMachines(nn.Module):
    """Opens where every machine says that the prompt is an edit prompt: the lowest of their logits decides."""

    def __init__(self, shapes: tuple[MachineShape, ...]):
        super().__init__()
        self.machines = nn.ModuleList(Machine(shape) for shape in shapes)

    def forward(self, z: Tensor) -> Tensor:
        """(n, n_features) -> (n,) gate logits; 0 is the threshold of each machine."""
        return torch.stack([machine(z) for machine in self.machines]).amin(0)
