"""The nouns of the project: a prompt, the bucket it stands in, and the split of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class PromptError(ValueError):
    """A prompt file, bucket or split that cannot be used as it is; the message says what, where, and how to mend it."""


class Bucket(StrEnum):
    """The three sides of selective refusal editing (Residual Paving, section 3.1).

    EDIT          prompts whose refusal is to be replaced by the edit target
    BENIGN_KEEP   ordinary prompts; behaviour is to stay the base's
    HARMFUL_KEEP  harmful prompts; the base's refusals are to stay
    """

    EDIT = "edit"
    BENIGN_KEEP = "benign_keep"
    HARMFUL_KEEP = "harmful_keep"


class SplitName(StrEnum):
    TRAIN = "train"
    CALIBRATION = "calibration"
    HELD_OUT = "held_out"


class Role(StrEnum):
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True)
class Turn:
    """What one side said earlier in a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Prompt:
    """One user request, in the bucket its owner put it in.

    id      kept for good: splits, caches and results refer to it
    text    the request, without any chat template; of a conversation, what the user says last
    group   prompts of one group never stand on two sides of a split (a focus word, a template, a source document)
    target  the owner's own edit target for this prompt, where there is one
    source  where the prompt came from, for the record only
    system  the system prompt it is asked behind; None: whatever the chat template does without one
    history earlier turns of the conversation it ends: user and assistant in turn, from the user's first to the
            assistant's last; empty where the request stands alone
    """

    id: str
    text: str
    bucket: Bucket
    group: str
    target: str | None = None
    source: str | None = None
    system: str | None = None
    history: tuple[Turn, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The whole of it as chat templates take it."""
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        earlier = [{"role": turn.role.value, "content": turn.content} for turn in self.history]
        return [*opening, *earlier, {"role": "user", "content": self.text}]

    @property
    def asked(self) -> tuple[str, ...]:
        """What a model is shown of it, for the names of what is kept: the text, behind its system prompt if it has one.

        A conversation has four parts or more, so that none is named as a text behind a system prompt.
        """
        if self.history:
            return (str(self.system is None), self.system or "", *(turn.content for turn in self.history), self.text)
        return (self.text,) if self.system is None else (self.system, self.text)

    @property
    def transcript(self) -> str:
        """What a judge, a person or a search for duplicates reads: the text, below the earlier turns if there are any."""
        if not self.history:
            return self.text
        earlier = [f"{turn.role.value.capitalize()}: {turn.content}" for turn in self.history]
        return "\n\n".join([*earlier, f"User: {self.text}"])


@dataclass(frozen=True)
class Splits:
    """Train / calibration / held-out prompts, and what every filter left of them."""

    train: tuple[Prompt, ...]
    calibration: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    counts: tuple[Mapping[str, object], ...] = field(default=())

    def of(self, split: SplitName, bucket: Bucket | None = None) -> tuple[Prompt, ...]:
        prompts: tuple[Prompt, ...] = getattr(self, split.value)
        return prompts if bucket is None else tuple(p for p in prompts if p.bucket == bucket)

    def ids(self) -> dict[str, dict[str, list[str]]]:
        return {s.value: {b.value: [p.id for p in self.of(s, b)] for b in Bucket} for s in SplitName}


def count_by_bucket(prompts: Iterable[Prompt]) -> dict[str, int]:
    counts = {b.value: 0 for b in Bucket}
    for p in prompts:
        counts[p.bucket.value] += 1
    return counts
