"""Prompts with an opening to be learned (C-ΔΘ, stage 2)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from paving.backbone import Backbone, BackboneError, render_ids


class Example(NamedTuple):
    """Token ids of a rendered prompt and of the answer, or its opening, to be learned."""

    prompt: list[int]
    answer: list[int]


def opening_examples(
    backbone: Backbone, prompts: Sequence[str], openings: Sequence[str], *, seed: int, epoch: int = 0
) -> list[Example]:
    """One example a prompt, in their order; its opening is drawn anew each epoch, fixed by `seed` and `epoch`.

    prompts   request texts without a chat template
    openings  phrases of one kind. No end-of-turn token follows them: an opening is where an answer begins

    raises BackboneError if a prompt with its opening is longer than the context; ValueError without prompts or openings
    """
    if not prompts or not openings:
        raise ValueError(f"{len(prompts)} prompts and {len(openings)} openings give no examples; at least one of each.")
    # A string seeds by its digest, the same in every process; a tuple would not be taken at all.
    drawn = random.Random(f"openings/{seed}/{epoch}").choices(openings, k=len(prompts))
    known = {phrase: backbone.tokenizer(phrase, add_special_tokens=False)["input_ids"] for phrase in set(drawn)}
    examples = [Example(render_ids(backbone, p), list(known[o])) for p, o in zip(prompts, drawn, strict=True)]
    for i, example in enumerate(examples):
        length = len(example.prompt) + len(example.answer)
        if length > backbone.context_length:
            raise BackboneError(
                f"prompt {i} ({prompts[i][:40]!r}...) has {length} tokens with its opening; the context of "
                f"{backbone.name} has {backbone.context_length}. Shorten or drop it."
            )
    return examples
