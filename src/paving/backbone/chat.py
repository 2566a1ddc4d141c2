"""Render requests with the model's own chat template into left-padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from torch import Tensor

from paving.backbone.layers import BackboneError, ChatTemplateError
from paving.backbone.load import Backbone
from paving.prompts.types import Bucket, Prompt

# Some templates write today's date or open a thinking block. Both would make a cached trace depend on more than the
# prompt; templates that do not know these names ignore them.
TEMPLATE_ARGUMENTS = {"date_string": "01 Jan 2025", "enable_thinking": False}


@dataclass(frozen=True)
class PromptBatch:
    """Prompts as the model sees them. Row i of every field is one prompt.

    input_ids       (n, width) int64, padded on the left: column width-1 is every prompt's last token
    attention_mask  (n, width) int64, 0 on padding
    ids             prompt ids, for records only
    bucket          the true label of each row, or None where there is none. Only the oracle may read it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    ids: tuple[str, ...]
    bucket: tuple[Bucket | None, ...]

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def width(self) -> int:
        return self.input_ids.shape[1]

    @property
    def position_ids(self) -> Tensor:
        """(n, width) int64: 0 at each row's first real token."""
        return (self.attention_mask.cumsum(-1) - 1).clamp_min(0)


def render_ids(backbone: Backbone, text: str, *, system: str | None = None) -> list[int]:
    """Token ids of one user turn, behind a system prompt if given, ending where the assistant's answer begins.

    raises BackboneError where the model's chat template takes no system prompt
    """
    opening = [] if system is None else [{"role": "system", "content": system}]
    return render_messages(backbone, [*opening, {"role": "user", "content": text}])


def prompt_ids(backbone: Backbone, prompt: Prompt) -> list[int]:
    """Token ids of a prompt behind its system prompt and earlier turns, ending where the assistant's answer begins.

    raises BackboneError where the model's chat template takes no system prompt, and it has one
    """
    return render_messages(backbone, prompt.messages)


def render_messages(backbone: Backbone, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation, ending where the assistant's next answer begins.

    raises ChatTemplateError where the model's chat template takes no system prompt, or cannot say these turns
    """
    try:
        encoded = backbone.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, **TEMPLATE_ARGUMENTS
        )
    except TemplateError as error:
        if not messages or messages[0]["role"] != "system":
            raise ChatTemplateError(
                f"the chat template of {backbone.name} cannot say these {len(messages)} messages ({error})."
            ) from error
        raise ChatTemplateError(
            f"the chat template of {backbone.name} takes no system prompt ({error}). Leave it out, or put it before "
            "the prompt's own words."
        ) from error
    return list(encoded["input_ids"])


def pad_left(backbone: Backbone, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), both (n, longest) int64 on the backbone's device."""
    width = max(len(r) for r in rows)
    ids = torch.full((len(rows), width), backbone.pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = 1
    return ids.to(backbone.device), mask.to(backbone.device)


def render_batch(backbone: Backbone, prompts: Sequence[Prompt], *, room: int = 0) -> PromptBatch:
    """Render prompts into one batch; `room` is how many tokens must still fit after the prompt.

    raises BackboneError naming the prompt if one is longer than the context allows.
    """
    rows = [checked_ids(backbone, p, room=room) for p in prompts]
    ids, mask = pad_left(backbone, rows)
    return PromptBatch(ids, mask, tuple(p.id for p in prompts), tuple(p.bucket for p in prompts))


def checked_ids(backbone: Backbone, prompt: Prompt, *, room: int = 0) -> list[int]:
    """The prompt's token ids, refused if prompt and `room` do not fit the model's context."""
    row = prompt_ids(backbone, prompt)
    if len(row) + room > backbone.context_length:
        raise BackboneError(
            f"prompt {prompt.id} has {len(row)} tokens; with {room} to follow it does not fit the "
            f"{backbone.context_length}-token context of {backbone.name}. Shorten or drop it."
        )
    return row
