"""One engine step, taken apart: which rows of the flattened batch belong to which request, and what they are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """One request's rows in a step: `length` of them from `start` on, for the tokens from `position` on.

    prompt  tokens of its prompt. What a row is follows from positions alone: a prompt comes in chunks, a preempted
            request comes with its whole answer at once, and a chunk of one row may well be prompt.
    """

    request: str
    start: int
    length: int
    position: int
    prompt: int

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def prompt_rows(self) -> range:
        return range(self.start, max(self.start, min(self.end, self._row(self.prompt))))

    @property
    def last_prompt_row(self) -> int | None:
        """The row the gate is decided from; None where this step does not hold it."""
        row = self._row(self.prompt - 1)
        return row if self.start <= row < self.end else None

    @property
    def edited_rows(self) -> range:
        """The last prompt token and all behind it: where an open gate edits (algorithm 1)."""
        return range(min(self.end, max(self.start, self._row(self.prompt - 1))), self.end)

    def _row(self, token: int) -> int:
        return self.start + token - self.position


def spans_of(requests: list[str], lengths: list[int], positions: list[int], prompts: list[int]) -> tuple[Span, ...]:
    """Rows lie request after request, in the order of the batch."""
    found, start = [], 0
    for request, length, position, prompt in zip(requests, lengths, positions, prompts, strict=True):
        found.append(Span(request, start, length, position, prompt))
        start += length
    return tuple(found)
