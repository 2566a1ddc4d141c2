"""What a router or probe reads: the residual states of a prompt, pooled over its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paving.backbone import Backbone, PromptBatch
from paving.backbone.hooks import record_residuals


def boundary_states(backbone: Backbone, batch: PromptBatch, layers: Sequence[int], pooling: str) -> Tensor:
    """(n, n_features) float32, layer beside layer, from one unedited pass over the prompts."""
    mask = batch.attention_mask

    def pool(resid: Tensor) -> Tensor:
        return pooled(resid, mask, pooling)

    with torch.no_grad(), record_residuals(backbone, layers, keep=pool) as states:
        backbone.model.get_decoder()(
            input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
        )
    return torch.cat([states[layer] for layer in layers], dim=1)


def pooled(resid: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """(n, width, d) -> (n, d) float32: the last column's state, or the mean over real tokens; (n, 2 d) for both."""
    parts = [resid[:, -1].float()] if "last" in pooling else []
    if "mean" in pooling:
        parts.append((resid.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    return torch.cat(parts, dim=1)
