"""How far an intervention moves the model on prompts it should leave alone (Residual Paving, A.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from paving.backbone import Backbone, PromptBatch, checked_ids, pad_left
from paving.generation import batches_by_length
from paving.intervention import Intervention
from paving.processes import gathered, of_all, shared
from paving.prompts.types import Prompt
from paving.traces.forward import pad_right, teacher_forced_logits
from paving.traces.top_k import TopK, kl_from_top_k, top_k


@torch.no_grad()
def keep_divergence(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    continuations: Mapping[str, tuple[int, ...]],
    intervention: Intervention,
    *,
    k: int,
    batch_size: int = 16,
    base: dict[tuple[str, ...], TopK] | None = None,
    tick: Callable[[int], None] = lambda _n: None,
) -> dict[str, float]:
    """Prompt id -> mean KL(base || edited) along the base's own continuation, on the base's top-k (nats).

    base: batch of prompt ids -> the base's own distributions there, which are put in and taken out again: half of the
          passes of whoever measures many interventions on the same prompts. 12 k bytes a token

    Exactly 0 for a batch in which every gate is closed: such a batch is the base's, bit for bit, and is not run twice.
    """
    rows = {p.id: checked_ids(backbone, p) for p in prompts}
    measured: list[dict[str, float]] = []
    for chunk in shared(list(batches_by_length(prompts, rows, batch_size))):
        ids, mask = pad_left(backbone, [rows[p.id] for p in chunk])
        batch = PromptBatch(ids, mask, tuple(p.id for p in chunk), tuple(p.bucket for p in chunk))
        tokens, token_mask = pad_right([continuations[p.id] for p in chunk], backbone.pad_id, backbone.device)
        with intervention.apply(backbone, batch) as applied:
            edited = teacher_forced_logits(backbone, batch, tokens)
            closed = all(row.gate == 0.0 for row in applied.rows())
        if closed:
            divergence = [0.0] * len(chunk)
        else:
            kept = {} if base is None else base
            if batch.ids not in kept:
                kept[batch.ids] = top_k(teacher_forced_logits(backbone, batch, tokens), k)
            divergence = kl_from_top_k(kept[batch.ids], edited, token_mask).tolist()
        measured.append(dict(zip((p.id for p in chunk), divergence, strict=True)))
        tick(of_all(len(chunk)))
    return {i: value for batch in gathered(measured) for i, value in batch.items()}


@torch.no_grad()
def continuation_log_prob(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    continuations: Mapping[str, tuple[int, ...]],
    intervention: Intervention,
    *,
    batch_size: int = 16,
) -> dict[str, float]:
    """Prompt id -> mean log-probability per token of a given continuation under the intervention (nats)."""
    rows = {p.id: checked_ids(backbone, p) for p in prompts}
    result: dict[str, float] = {}
    for chunk in batches_by_length(prompts, rows, batch_size):
        ids, mask = pad_left(backbone, [rows[p.id] for p in chunk])
        batch = PromptBatch(ids, mask, tuple(p.id for p in chunk), tuple(p.bucket for p in chunk))
        tokens, token_mask = pad_right([continuations[p.id] for p in chunk], backbone.pad_id, backbone.device)
        with intervention.apply(backbone, batch):
            logits = teacher_forced_logits(backbone, batch, tokens)
        log_probs = logits.float().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1) * token_mask
        means = log_probs.sum(-1) / token_mask.sum(-1)
        result.update(zip((p.id for p in chunk), means.tolist(), strict=True))
    return result
