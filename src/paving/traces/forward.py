"""Teacher-forced passes: logits of a given continuation, with or without a cached prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from paving.backbone import Backbone, PromptBatch
from paving.backbone.hooks import contiguous_head_input

Prefix = Sequence[Tensor]  # one prompt's KV without its last token: per layer (2, kv_heads, width-1, head_dim)


def pad_right(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(tokens, mask), both (n, longest) int64; mask is 0 on padding."""
    longest = max(len(r) for r in rows)
    tokens = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return tokens.to(device), mask.to(device)


def teacher_forced_logits(
    backbone: Backbone, batch: PromptBatch, continuation: Tensor, *, cache: DynamicCache | None = None
) -> Tensor:
    """Logits for every token of a continuation given the prompt and the continuation's earlier tokens.

    continuation: (n, T) int64, padded on the right (padding is never looked at by the tokens before it)
    cache:        the KV of all prompt columns but the last; None runs the whole prompt
    returns       (n, T, vocab) in the backbone's dtype; step t predicts continuation[:, t]
    """
    n_steps = continuation.shape[1]
    # Inputs are the prompt's last token and the continuation without its own last: T positions for T predictions.
    tail = torch.cat([batch.input_ids[:, -1:], continuation[:, :-1]], dim=1)
    tail_positions = batch.position_ids[:, -1:] + torch.arange(n_steps, device=tail.device)
    mask = torch.cat([batch.attention_mask, torch.ones_like(continuation[:, :-1])], dim=1)
    if cache is None:
        ids = torch.cat([batch.input_ids[:, :-1], tail], dim=1)
        positions = torch.cat([batch.position_ids[:, :-1], tail_positions], dim=1)
    else:
        ids, positions = tail, tail_positions
    with contiguous_head_input(backbone):
        return backbone.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=n_steps,
        ).logits


def next_token_logits(backbone: Backbone, batch: PromptBatch, *, embeddings: Tensor | None = None) -> Tensor:
    """(n, vocab) after the last prompt token, float32 at least, with its graph. `embeddings`, (n, width, d_model), stand in
    for the prompts' own."""
    inputs = {"input_ids": batch.input_ids} if embeddings is None else {"inputs_embeds": embeddings}
    with contiguous_head_input(backbone):
        logits = backbone.model(
            **inputs,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=1,
        ).logits[:, -1]
    return logits if logits.dtype == torch.float64 else logits.float()


def prompt_cache(backbone: Backbone, batch: PromptBatch) -> DynamicCache:
    """KV of every prompt column but the last. Full-length layers also where the model slides a window: the mask does it."""
    cache = DynamicCache()
    backbone.model.get_decoder()(
        input_ids=batch.input_ids[:, :-1],
        attention_mask=batch.attention_mask[:, :-1],
        position_ids=batch.position_ids[:, :-1],
        past_key_values=cache,
        use_cache=True,
    )
    return cache


def split_cache(cache: DynamicCache, batch: PromptBatch) -> list[Tensor]:
    """One tensor a row, (n_layers, 2, kv_heads, real columns, head_dim), padding dropped.

    raises ValueError for models whose layers differ in the shape of their KV (they cannot be stacked).
    """
    lengths = (batch.attention_mask.sum(1) - 1).tolist()
    rows = []
    for i, length in enumerate(lengths):
        layers = []
        for layer in cache.layers:
            keys, values = layer.keys[i], layer.values[i]
            layers.append(torch.stack([keys[:, keys.shape[1] - length :], values[:, values.shape[1] - length :]]))
        rows.append(torch.stack(layers).contiguous())
    return rows


def join_cache(rows: Sequence[Tensor], width: int) -> DynamicCache:
    """A left-padded cache of `width` columns for one batch, from the rows that `split_cache` made."""
    n_layers, _, heads, _, head_dim = rows[0].shape
    joined = rows[0].new_zeros((n_layers, 2, len(rows), heads, width, head_dim))
    for i, row in enumerate(rows):
        length = row.shape[3]
        joined[:, :, i, :, width - length :] = row
    cache = DynamicCache()
    for layer in range(n_layers):
        cache.update(joined[layer, 0], joined[layer, 1], layer)
    return cache
