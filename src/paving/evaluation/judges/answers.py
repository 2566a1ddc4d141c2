"""What a judge is given: the rows of any completions file, one at a time, wherever they were generated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paving.evaluation.json_lines import RowError, read_objects
from paving.prompts.types import Bucket

EXAMPLE = '{"prompt": "...", "response": "..."}'


@dataclass(frozen=True)
class Answer:
    """One prompt and what some model made of it.

    line       1-based line of the completions file
    id         the row's own, or `line-<line>`
    bucket     None where it is not known
    truncated  cut by a token limit, not ended by the model
    """

    line: int
    id: str
    prompt: str
    response: str
    bucket: Bucket | None = None
    truncated: bool = False


def read_answers(path: Path) -> Iterator[Answer]:
    """The completions of a JSON lines file, in its order and in constant memory.

    Each line holds `prompt` and `response`, and may hold `id`, `bucket` and `truncated`; further fields, such as those
    that a run saves, are passed over. An empty response is an answer; an empty prompt is a mistake.

    raises RowError for a row that cannot be used: rows are never skipped, since counts would no longer be the file's.
    """
    line = None
    for line in read_objects(path, example=EXAMPLE):
        prompt, response = line.text("prompt"), line.text("response")
        if not prompt.strip():
            raise RowError(f"{line.place}: `prompt` is blank. Write what was asked, or drop the line.")
        yield Answer(line.number, line.id(), prompt, response, line.bucket(), line.flag("truncated"))
    if line is None:
        raise RowError(f"{path} holds no completions. Give a file with at least one line such as {EXAMPLE}.")
