"""Token pairs, their alignment at the last prompt tokens, and the metric that is read there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from paving.backbone import Backbone, pad_left, render_ids
from paving.backbone.hooks import contiguous_head_input
from paving.circuit.mask import CircuitError
from paving.circuit.pairs import Pair

Metric: TypeAlias = Callable[[Tensor], Tensor]
"""From logits at the last prompt token, (n, vocab) float32, to one number a row, (n,), differentiably."""

Metrics: TypeAlias = Metric | Sequence[Metric]
"""One metric for all pairs, or one a pair where it depends on the pair (KL from the pair's own clean run)."""


@dataclass(frozen=True)
class TokenPair:
    """Token ids of the clean (harmful) and of the corrupt (benign) prompt; both end where the answer begins."""

    id: str
    clean: tuple[int, ...]
    corrupt: tuple[int, ...]


def token_pairs(backbone: Backbone, pairs: Sequence[Pair]) -> tuple[TokenPair, ...]:
    """Pairs in the model's chat template: the harmful prompt is clean, the benign one corrupt."""
    return tuple(
        TokenPair(p.id, tuple(render_ids(backbone, p.harmful)), tuple(render_ids(backbone, p.benign))) for p in pairs
    )


@dataclass(frozen=True)
class PairBatch:
    """Some pairs, padded on the left to one width t, so that column t-1 is every prompt's last token.

    clean, corrupt             (n, t) int64
    clean_mask, corrupt_mask   (n, t) int64, 0 on padding
    rows                       the pairs' places in the whole list
    """

    clean: Tensor
    clean_mask: Tensor
    corrupt: Tensor
    corrupt_mask: Tensor
    rows: range

    @property
    def shared(self) -> Tensor:
        """(n, t, 1) bool: columns where both prompts have a token.

        The j-th token from the end of one prompt stands for the j-th from the end of the other. Where only one prompt
        has a token there is nothing to patch with: the clean run keeps its own activation, and the difference is zero.
        """
        return (self.clean_mask * self.corrupt_mask).bool()[..., None]


def batches(backbone: Backbone, pairs: Sequence[TokenPair], size: int) -> Iterator[PairBatch]:
    """raises CircuitError without pairs, for an empty prompt, or for one that does not fit the context"""
    if not pairs or size < 1:
        raise CircuitError(f"{len(pairs)} pairs in batches of {size} leave nothing to attribute; give at least one of each.")
    for pair in pairs:
        lengths = len(pair.clean), len(pair.corrupt)
        if not all(0 < n <= backbone.context_length for n in lengths):
            raise CircuitError(
                f"pair {pair.id} has prompts of {lengths[0]} and {lengths[1]} tokens; {backbone.name} takes 1 to "
                f"{backbone.context_length}. Shorten or drop it."
            )
    for start in range(0, len(pairs), size):
        some = pairs[start : start + size]
        ids, mask = pad_left(backbone, [*(p.clean for p in some), *(p.corrupt for p in some)])
        n = len(some)
        yield PairBatch(ids[:n], mask[:n], ids[n:], mask[n:], range(start, start + n))


def last_logits(backbone: Backbone, ids: Tensor, mask: Tensor) -> Tensor:
    """(n, vocab) at the last column, float32 at least. ids, mask: (n, t) int64, padded on the left."""
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with contiguous_head_input(backbone):
        output = backbone.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
        )
    logits = output.logits[:, -1]
    return logits if logits.dtype == torch.float64 else logits.float()


def measured(metrics: Metrics, logits: Tensor, rows: Sequence[int]) -> Tensor:
    """(n,): the metric of every row. logits: (n, vocab); rows: which pair each row is of.

    raises CircuitError if a metric does not give one number a row
    """
    if callable(metrics):
        values = metrics(logits)
    else:
        values = torch.cat([metrics[row](logits[i : i + 1]) for i, row in enumerate(rows)])
    if values.shape != (len(rows),):
        raise CircuitError(
            f"the metric gave {tuple(values.shape)} for logits {tuple(logits.shape)}; one number a row is needed: "
            f"({len(rows)},). Do not average over the batch."
        )
    return values


def check_metrics(metrics: Metrics, pairs: Sequence[TokenPair]) -> None:
    """raises CircuitError unless there is one metric for all, or one a pair"""
    if not callable(metrics) and len(metrics) != len(pairs):
        raise CircuitError(f"{len(metrics)} metrics for {len(pairs)} pairs; give one for all, or one a pair.")


def logit_difference(up: Sequence[int], down: Sequence[int]) -> Metric:
    """Mean logit of the tokens `up` less that of the tokens `down`."""
    return lambda logits: logits[:, list(up)].mean(-1) - logits[:, list(down)].mean(-1)


def kl_from(log_probs: Tensor) -> Metric:
    """KL(reference ‖ model) in nats. log_probs: (vocab,) of the reference distribution."""

    def metric(logits: Tensor) -> Tensor:
        reference = log_probs.to(logits)
        return (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1)

    return metric


@torch.no_grad()
def kl_from_clean(backbone: Backbone, pairs: Sequence[TokenPair], *, batch_size: int = 4) -> list[Metric]:
    """Per pair, KL from the clean run's own distribution (nats): 0 on the clean run. Hanna et al., section 3.

    Its gradient at the clean run is zero, so EAP with it scores every edge 0, and EAP-IG is needed.
    """
    found = []
    for batch in batches(backbone, pairs, batch_size):
        found += [kl_from(row) for row in last_logits(backbone, batch.clean, batch.clean_mask).log_softmax(-1)]
    return found
