"""A conversation in a cell: the list of messages that chat APIs and conversational data sets have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .types import PromptError, Role, Turn

MEND = (
    'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, '
    '{"role": "user", "content": "..."}].'
)


@dataclass(frozen=True)
class Conversation:
    """system: its system prompt, if it begins with one; history: the earlier turns; text: what the user says last."""

    system: str | None
    history: tuple[Turn, ...]
    text: str


def read_conversation(messages: Sequence[object], where: str, text_of: Callable[[object, str], str | None]) -> Conversation:
    """The messages of one cell: a system message or none, then user and assistant in turn, the user first and last.

    where    what an error names
    text_of  (content, what an error names) -> the text as it stands, None where it is blank

    raises PromptError for anything else, as a message that is left out would change what is asked
    """
    said = [_message(message, f"{where}, message {n}", text_of) for n, message in enumerate(messages, 1)]
    system = said.pop(0)[1] if said and said[0][0] == "system" else None
    expected = [Role.USER if n % 2 == 0 else Role.ASSISTANT for n in range(len(said))]
    for n, ((role, _), wanted) in enumerate(zip(said, expected, strict=True), 2 if system is not None else 1):
        if role != wanted:
            raise PromptError(
                f"{where}, message {n}: the role is {role!r} where {wanted.value!r} was expected. A conversation is a "
                f"system message or none, then user and assistant in turn. {MEND}"
            )
    if len(said) % 2 == 0:
        raise PromptError(
            f"{where}: the conversation "
            + (
                "has no message of the user"
                if not said
                else "ends with the assistant's turn, so that there is nothing to answer"
            )
            + f". End it with the user's, and put an answer you want into `target`. {MEND}"
        )
    turns = tuple(Turn(role, text) for role, (_, text) in zip(expected, said, strict=True))
    return Conversation(system, turns[:-1], turns[-1].content)


def _message(message: object, where: str, text_of: Callable[[object, str], str | None]) -> tuple[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise PromptError(f"{where} is no message with a role. {MEND}")
    if more := sorted(str(key) for key, value in message.items() if key not in ("role", "content") and value is not None):
        # Tool calls, names, pictures: rendered by some templates and not by others, so they cannot be left out in silence.
        raise PromptError(f"{where} has {more} beside `role` and `content`. Only text is taken: remove them, or the row.")
    text = text_of(message.get("content"), where)
    if text is None:
        raise PromptError(f"{where} is blank. Write what was said there, or drop the row.")
    return message["role"], text
