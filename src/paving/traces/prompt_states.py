"""Every block's state of a prompt, last token and mean, kept in the store: what any router or probe could read of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paving.backbone import Backbone, PromptBatch, checked_ids, pad_left
from paving.backbone.hooks import record_residuals
from paving.prompts.types import Prompt
from paving.traces.store import TraceStore, chunks

Tick = Callable[[int], None]
KIND = "prompt-states"


@dataclass(frozen=True)
class PromptStates:
    """last, mean: (n_blocks, d_model), blocks' outputs at the last prompt token and their mean over the prompt.

    blocks  which those are; None: every one
    """

    last: Tensor
    mean: Tensor
    blocks: tuple[int, ...] | None = None

    def of(self, blocks: Sequence[int]) -> PromptStates:
        """These blocks alone, in tensors of their own."""
        kept = tuple(sorted(set(blocks)))
        return PromptStates(self.last[list(kept)].clone(), self.mean[list(kept)].clone(), kept)

    def features(self, layers: Sequence[int], pooling: str) -> Tensor:
        """(n_features) float32, the router's input: as `boundary_features` lays it out."""
        parts = [self.last] if "last" in pooling else []
        if "mean" in pooling:
            parts.append(self.mean)
        rows = list(layers) if self.blocks is None else [self.blocks.index(layer) for layer in layers]
        return torch.cat([part[rows].float() for part in parts], dim=1).flatten()


@torch.no_grad()
def prompt_states(
    backbone: Backbone,
    store: TraceStore,
    prompts: Sequence[Prompt],
    *,
    blocks: Sequence[int] | None = None,
    batch_size: int = 16,
    tick: Tick | None = None,
) -> dict[str, PromptStates]:
    """Prompt id -> its states under the untouched base. One pass over the prompts that the store does not hold yet.

    blocks: those that will be read; None: all, which for many prompts of a large model are gigabytes
    """
    rows = {p.id: checked_ids(backbone, p) for p in prompts}
    keys = {i: TraceStore.key(base=backbone.fingerprint, dtype=str(backbone.dtype), prompt=r) for i, r in rows.items()}
    missing = sorted((i for i in rows if not store.has(KIND, keys[i])), key=lambda i: (len(rows[i]), i))
    if tick is not None:
        tick(len(rows) - len(missing))
    for chunk in chunks(missing, batch_size):
        ids, mask = pad_left(backbone, [rows[i] for i in chunk])
        for name, tensors in zip(chunk, _states(backbone, ids, mask), strict=True):
            store.put(KIND, keys[name], tensors)
        if tick is not None:
            tick(len(chunk))

    def read(key: str) -> PromptStates:
        every = PromptStates(**store.get(KIND, key))
        return every if blocks is None else every.of(blocks)

    return {i: read(key) for i, key in keys.items()}


def _states(backbone: Backbone, ids: Tensor, mask: Tensor) -> list[dict[str, Tensor]]:
    n_tokens = mask.sum(1, keepdim=True)

    def pooled(resid: Tensor) -> tuple[Tensor, Tensor]:
        # The mean in float32: it is no state of the model, and a sum of bfloat16 loses what a router may need.
        return resid[:, -1].clone(), (resid.float() * mask[..., None]).sum(1) / n_tokens

    layers = range(backbone.n_layers)
    batch = PromptBatch(ids, mask, ("",) * len(ids), (None,) * len(ids))
    with record_residuals(backbone, layers, keep=pooled) as seen:
        backbone.model.get_decoder()(input_ids=ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False)
    last = torch.stack([seen[layer][0] for layer in layers], dim=1)
    mean = torch.stack([seen[layer][1] for layer in layers], dim=1)
    return [{"last": last[i], "mean": mean[i]} for i in range(len(ids))]
