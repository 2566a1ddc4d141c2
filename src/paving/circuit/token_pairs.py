"""Token pairs, their alignment at the last prompt tokens, and the logits that are read there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from paving.backbone import Backbone, PromptBatch, pad_left, render_ids
from paving.circuit.mask import CircuitError
from paving.circuit.pairs import Pair
from paving.traces.forward import next_token_logits


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


def pair_batches(backbone: Backbone, pairs: Sequence[TokenPair], size: int) -> Iterator[PairBatch]:
    """In the order given.

    raises CircuitError without pairs, for an empty prompt, or for one that does not fit the context
    """
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


def last_logits(backbone: Backbone, ids: Tensor, mask: Tensor, *, embeddings: Tensor | None = None) -> Tensor:
    """(n, vocab) after the last column, float32 at least. ids, mask: (n, t) int64, padded on the left; `embeddings`,
    (n, t, d_model), replace ids."""
    return next_token_logits(backbone, PromptBatch(ids, mask, (), ()), embeddings=embeddings)
