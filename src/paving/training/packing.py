"""Several short prompts with their answers in one sequence: no padding, and what their prompts share is read once.

Requests under one chat template share its opening (the system turn), often half of a short prompt. Packed, a step of
eight such rows takes about half the time of a padded batch, for the same loss up to rounding
(benchmarks/circuit_cost.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from paving.backbone import Backbone, BackboneError, PromptBatch, pad_left
from paving.backbone.hooks import contiguous_head_input
from paving.backbone.layers import text_config
from paving.traces.forward import pad_right, teacher_forced_logits
from paving.training.opening_examples import Example


def packed_logits(backbone: Backbone, rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Teacher-forced logits of all answer tokens, (tokens, vocab) in the backbone's dtype, and those tokens, (tokens,).

    A token sees its own row and the shared opening, nothing else; positions count from each row's own start.
    """
    shared = _shared_opening(rows)
    ids, positions, owner = list(rows[0].prompt[:shared]), list(range(shared)), [-1] * shared
    at, answers = [], []
    for i, row in enumerate(rows):
        tail = [*row.prompt[shared:], *row.answer[:-1]]
        first = len(ids) + len(row.prompt) - shared - 1  # the prompt's last token predicts the answer's first
        at += range(first, first + len(row.answer))
        answers += row.answer
        ids += tail
        positions += range(shared, shared + len(tail))
        owner += [i] * len(tail)
    device = backbone.device
    with contiguous_head_input(backbone):
        logits = backbone.model(
            input_ids=torch.tensor([ids], device=device),
            attention_mask=_mask(torch.tensor(owner, device=device), _attention_dtype(backbone)),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(at, device=device),
        ).logits[0]
    return logits, torch.tensor(answers, device=device)


def answer_logits(backbone: Backbone, rows: Sequence[Example], *, packing: bool) -> tuple[Tensor, Tensor]:
    """Logits of all answer tokens, (tokens, vocab), and those tokens: from one packed sequence, or a padded batch.

    Made for answer positions only: the vocabulary is by far the largest matrix of a small model.
    """
    return packed_logits(backbone, rows) if packing else _padded_logits(backbone, rows)


def answer_cross_entropy(backbone: Backbone, rows: Sequence[Example], *, packing: bool) -> Tensor:
    """Cross-entropy of the answer tokens given their prompts, mean over all tokens of the batch (nats), with its graph."""
    logits, answers = answer_logits(backbone, rows, packing=packing)
    return nn.functional.cross_entropy(logits.float(), answers)


@torch.no_grad()
def check_packing(backbone: Backbone, rows: Sequence[Example]) -> None:
    """raises BackboneError for a model whose answers change by packing: one that ignores the mask or the positions
    given (ALiBi, recurrent blocks), or slides a window shorter than the rows."""
    check_window(backbone, rows)
    logits, _ = packed_logits(backbone, rows)
    reference = _padded_logits(backbone, rows)[0].float()
    worst = ((logits.float() - reference).abs().max() / reference.abs().max()).item()
    if worst > TOLERANCE:
        raise BackboneError(
            f"{backbone.name} does not answer packed rows as it answers padded ones (they differ by {worst:.1%}). "
            "Set packing=False."
        )


def check_window(backbone: Backbone, rows: Iterable[Example]) -> None:
    """raises BackboneError where a row is longer than the window that the model slides: packed, it would see all of it"""
    window = getattr(text_config(backbone.model), "sliding_window", None)
    longest = max((len(r.prompt) + len(r.answer) for r in rows), default=0)
    if window is not None and longest > window:
        raise BackboneError(
            f"{backbone.name} slides a window of {window} tokens, and a row has {longest}: packed, it would see more "
            "than the model does. Set packing=False."
        )


def _padded_logits(backbone: Backbone, rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
    ids, mask = pad_left(backbone, [r.prompt for r in rows])
    answer, answer_mask = pad_right([r.answer for r in rows], backbone.pad_id, backbone.device)
    batch = PromptBatch(ids, mask, ("",) * len(rows), (None,) * len(rows))
    chosen = answer_mask.bool()
    return teacher_forced_logits(backbone, batch, answer)[chosen], answer[chosen]


TOLERANCE = 0.1  # of the largest logit; bfloat16 rounding gives 0.03, a wrong mask or position more than 0.3


def _shared_opening(rows: Sequence[Example]) -> int:
    """How many first tokens all prompts share, at most all but the last of the shortest."""
    most = min(len(r.prompt) for r in rows) - 1
    return next((n for n in range(most) if len({r.prompt[n] for r in rows}) > 1), most)


def _attention_dtype(backbone: Backbone) -> torch.dtype:
    device = backbone.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else backbone.dtype


def _mask(owner: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, 1, tokens, tokens): 0 where a token may look, the dtype's minimum where not; owner -1 is the opening."""
    order = torch.arange(len(owner), device=owner.device)
    seen = (order[:, None] >= order) & ((owner[:, None] == owner) | (owner == -1))
    closed = torch.zeros(seen.shape, dtype=dtype, device=owner.device)
    return closed.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]
