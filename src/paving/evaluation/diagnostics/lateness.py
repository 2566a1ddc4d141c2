"""Refusals that a short generation would have missed: how many first appear after 16, 32 or 64 tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paving.evaluation.judges import Judge
from paving.evaluation.results import Rate
from paving.evaluation.statistics import wilson
from paving.generation import Completion
from paving.prompts.types import Bucket

LENGTHS = (16, 32, 64)


@dataclass(frozen=True)
class LateRefusals:
    """Of the answers judged refusals at full length, the share that is none yet when cut after `length` tokens.

    n_long counts the refusals longer than that: where it is 0 the share says nothing about late refusals.
    """

    length: int
    share: Rate
    n_long: int


def late_refusals(
    completions: Sequence[Completion],
    judge: Judge,
    cut: Callable[[str, int], str],
    lengths: Sequence[int] = LENGTHS,
) -> list[LateRefusals]:
    """Judge full answers and their beginnings. cut(text, n): the text's first n tokens, in the model's own tokenizer."""

    def refused(c: Completion, text: str, truncated: bool) -> bool:
        return judge.judge(c.prompt, text, Bucket(c.bucket), truncated=truncated).refusal

    refusals = [c for c in completions if refused(c, c.response, c.truncated)]
    found = []
    for length in lengths:
        # An answer that ends before the cut is the same answer, also to a judge that looks at whether it was cut.
        long = [c for c in refusals if c.n_tokens > length]
        late = sum(not refused(c, cut(c.response, length), True) for c in long)
        found.append(LateRefusals(length, wilson(late, len(refusals)), len(long)))
    return found
