"""The frozen base's greedy continuations, kept in the store so that no stage and no second run decodes them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from paving.backbone import Backbone, checked_ids, pad_left
from paving.generation import Completion, Decoding, batches_by_length, decode
from paving.processes import agreed, gathered, of_all, shared
from paving.prompts.types import Prompt
from paving.traces.store import TraceStore

Tick = Callable[[int], None]


def base_continuations(
    backbone: Backbone,
    store: TraceStore,
    prompts: Sequence[Prompt],
    n_tokens: int,
    *,
    batch_size: int = 32,
    tick: Tick | None = None,
) -> dict[str, tuple[int, ...]]:
    """Prompt id -> at most n_tokens greedy token ids, with the end-of-turn token where the base ended its answer.

    A stored longer continuation serves a shorter request: greedy decoding is the same up to there.
    """
    rows = {p.id: checked_ids(backbone, p, room=n_tokens) for p in prompts}
    keys = {i: TraceStore.key(base=backbone.fingerprint, dtype=str(backbone.dtype), prompt=r) for i, r in rows.items()}
    found: dict[str, tuple[int, ...]] = {}
    for prompt in prompts:
        if store.has("continuation", keys[prompt.id]):
            stored = store.get("continuation", keys[prompt.id])
            tokens = stored["tokens"].tolist()
            if len(tokens) >= n_tokens or tokens[-1] in backbone.eos_ids:
                found[prompt.id] = tuple(tokens[:n_tokens])
    if tick is not None:
        tick(len(found))
    known = agreed(set(found))
    missing = [p for p in prompts if p.id not in known]
    made: list[dict[str, tuple[int, ...]]] = []
    for chunk in shared(list(batches_by_length(missing, rows, batch_size))):
        ids, mask = pad_left(backbone, [rows[p.id] for p in chunk])
        answers = decode(backbone, ids, mask, Decoding(max_new_tokens=n_tokens).generation_config(backbone))
        made.append({})
        for prompt, tokens in zip(chunk, answers.tolist(), strict=True):
            end = next((i + 1 for i, t in enumerate(tokens) if t in backbone.eos_ids), len(tokens))
            made[-1][prompt.id] = tuple(tokens[:end])
            store.put("continuation", keys[prompt.id], {"tokens": torch.tensor(tokens[:end], dtype=torch.int32)})
        if tick is not None:
            tick(of_all(len(chunk)))
    for answers in gathered(made):
        found |= answers
    return found


def as_completions(
    backbone: Backbone, prompts: Sequence[Prompt], continuations: dict[str, tuple[int, ...]]
) -> list[Completion]:
    """Continuations as completions of the untouched base, for a judge."""
    result = []
    for p in prompts:
        tokens = list(continuations[p.id])
        ended = bool(tokens) and tokens[-1] in backbone.eos_ids
        tokens = tokens[:-1] if ended else tokens
        text = backbone.tokenizer.decode(tokens, skip_special_tokens=True)
        result.append(Completion(p.id, p.bucket.value, p.transcript, text, len(tokens), not ended, gate=0.0))
    return result
