"""A controller whose prompts have been read before: it decides from kept states instead of running the prompt again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from paving.backbone import Backbone, PromptBatch
from paving.controller.residual_paving import Decision, PavedBatch, ResidualPaving
from paving.intervention import RowState
from paving.prompts.types import Prompt


@dataclass(frozen=True)
class Decided:
    """The controller's edits, gate and mixture taken from router inputs that are known already.

    features  prompt id -> the router's input (n_features) float32

    A prompt has the same gate in every batch and pass, and no prompt is run to be read. Unlike the controller itself it can
    be entered on a cached prompt, wherever the router reads.
    """

    controller: ResidualPaving
    features: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        return self.controller.name

    @contextmanager
    def apply(self, backbone: Backbone, batch: PromptBatch, *, start: int = 0) -> Iterator[PavedBatch]:
        """start is taken wherever it lies: nothing is left to read."""
        self.controller.check(backbone)
        run = PavedBatch(self.controller, backbone, batch, start)
        run.decide(self.stack(batch.ids, backbone.device))
        with run.attached():
            yield run

    def states(self, prompts: Sequence[Prompt], device: torch.device) -> dict[str, RowState]:
        """Prompt id -> gate, veto and mixture, without running the model."""
        if not prompts:
            return {}
        decision = self.decision(prompts, device)
        return {p.id: row for p, row in zip(prompts, decision.rows(), strict=True)}

    def decision(self, prompts: Sequence[Prompt], device: torch.device) -> Decision:
        nothing = torch.zeros((len(prompts), 1), dtype=torch.long, device=device)  # a decision reads no token
        batch = PromptBatch(nothing, nothing, tuple(p.id for p in prompts), tuple(p.bucket for p in prompts))
        return self.controller.decide(self.stack(batch.ids, device), batch)

    def stack(self, ids: Sequence[str], device: torch.device) -> Tensor:
        """(n, n_features) float32: the router's inputs of these prompts."""
        return torch.stack([self.features[i] for i in ids]).to(device)
