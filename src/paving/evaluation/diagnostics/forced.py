"""Several continuations forced on the same prompts: the prompt is run once, edited or not, and only the rest again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from paving.backbone import Backbone, PromptBatch, pad_left
from paving.backbone.hooks import record_residuals
from paving.intervention import Applied
from paving.prompts.types import Prompt
from paving.traces.forward import pad_right, prompt_cache, teacher_forced_logits


class LateStart(Protocol):
    """An intervention that can be entered when all columns of the prompt but the last are in the KV cache already.

    Edits touch generation positions only, so those columns are the base's under every intervention.
    """

    @property
    def name(self) -> str: ...

    def apply(self, backbone: Backbone, batch: PromptBatch, *, start: int = 0) -> AbstractContextManager[Applied]: ...


@dataclass(frozen=True)
class ForcedPass:
    """states (n, n_layers, T, d) float32 on the CPU; nll: mean nats per forced token (n); gates: effective (n).

    Step t of the states is the position that predicts token t. Steps behind a row's own end are padding.
    """

    states: Tensor
    nll: list[float]
    gates: list[float]


class ForcedPrompts:
    """One batch of prompts whose KV is computed once."""

    def __init__(self, backbone: Backbone, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]]):
        """ids: the token ids of each prompt, or of another prompt in its place (a teacher's)."""
        padded, mask = pad_left(backbone, ids)
        self.backbone = backbone
        self.batch = PromptBatch(padded, mask, tuple(p.id for p in prompts), tuple(p.bucket for p in prompts))
        self._cache = prompt_cache(backbone, self.batch)

    def run(
        self, continuations: Sequence[Sequence[int]], layers: Sequence[int], intervention: LateStart | None = None
    ) -> ForcedPass:
        """Force a continuation on each prompt, under an intervention or (None) on the untouched base."""
        backbone, batch = self.backbone, self.batch
        tokens, mask = pad_right(continuations, backbone.pad_id, backbone.device)
        start = batch.width - 1
        entered = nullcontext() if intervention is None else intervention.apply(backbone, batch, start=start)
        with entered as applied, record_residuals(backbone, layers, keep=_kept) as seen:
            logits = teacher_forced_logits(backbone, batch, tokens, cache=self._fresh_cache())
            gates = [0.0] * len(batch) if applied is None else [row.gate for row in applied.rows()]
        # The log-probability of the forced token alone: a second tensor of the vocabulary's size is not needed for it.
        chosen = logits.gather(-1, tokens[..., None]).squeeze(-1).float() - logits.float().logsumexp(-1)
        nll = (-(chosen * mask).sum(-1) / mask.sum(-1)).tolist()
        return ForcedPass(torch.stack([seen[layer] for layer in layers], dim=1), nll, gates)

    def _fresh_cache(self) -> DynamicCache:
        """A cache for one pass: a pass appends its own columns to the cache that it is given."""
        cache = DynamicCache()
        for i, layer in enumerate(self._cache.layers):
            cache.update(layer.keys, layer.values, i)
        return cache


def _kept(resid: Tensor) -> Tensor:
    return resid.float().cpu()
