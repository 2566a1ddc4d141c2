"""Answers of many variants of one intervention, each decoded once: kept as soon as a batch is done, found by content."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from paving.backbone import Backbone, checked_ids
from paving.generation import Completion, Decoding, batches_by_length, generate
from paving.intervention import Intervention, RowState
from paving.prompts.types import Prompt

Tick = Callable[[int], None]


class AnswerJournal:
    """Completions by key in one JSON lines file. A batch is appended when it is decoded, so a kill loses one batch."""

    def __init__(self, path: Path):
        self.path = path
        self._known: dict[str, Completion] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        """Lines until the first that is broken, which a kill may leave behind; it and what follows is cut off."""
        content = self.path.read_bytes()
        good = 0
        for line in content.splitlines(keepends=True):
            try:
                row = json.loads(line)
                completion = Completion(**row["answer"])
                if not line.endswith(b"\n"):
                    break
            except (ValueError, KeyError, TypeError):
                break
            mixture = completion.mixture
            self._known[row["key"]] = replace(completion, mixture=None if mixture is None else tuple(mixture))
            good += len(line)
        if good < len(content):
            with self.path.open("r+b") as file:
                file.truncate(good)

    def get(self, key: str) -> Completion | None:
        return self._known.get(key)

    def add(self, answers: Mapping[str, Completion]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            for key, completion in answers.items():
                file.write(json.dumps({"key": key, "answer": asdict(completion)}) + "\n")
        self._known.update(answers)


def answers(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    intervention: Intervention,
    states: Mapping[str, RowState],
    base: Mapping[str, Completion],
    key_of: Callable[[Prompt, RowState], str],
    decoding: Decoding,
    journal: AnswerJournal,
    *,
    batch_size: int = 32,
    tick: Tick | None = None,
) -> list[Completion]:
    """The intervention's answers, in the order of the prompts; only those with an open gate are decoded.

    states  prompt id -> what the intervention decides for it; a closed gate is answered by the base's own completion
    key_of  names everything that an edited answer depends on

    Variants share the answers that they have in common. The batches here are not those of the three-way rows, so
    answers may differ from theirs in rounding; compare variants with each other.
    """
    rows = {p.id: checked_ids(backbone, p, room=decoding.max_new_tokens) for p in prompts}
    keys = {p.id: key_of(p, states[p.id]) for p in prompts if states[p.id].gate > 0}
    missing = [p for p in prompts if p.id in keys and journal.get(keys[p.id]) is None]
    if tick is not None:
        tick(len(prompts) - len(missing))
    for chunk in batches_by_length(missing, rows, batch_size):
        decoded = generate(backbone, chunk, intervention, decoding, batch_size=batch_size)
        journal.add({keys[p.id]: c for p, c in zip(chunk, decoded, strict=True)})
        if tick is not None:
            tick(len(chunk))
    found = [_known(journal, keys[p.id], p) if p.id in keys else base[p.id] for p in prompts]
    return [replace(c, **asdict(states[c.id])) for c in found]


def _known(journal: AnswerJournal, key: str, prompt: Prompt) -> Completion:
    completion = journal.get(key)
    if completion is None:
        raise RuntimeError(f"the answer to {prompt.id} was decoded and is not in {journal.path}.")
    # The same request may stand in the file under another id, or in another bucket.
    return replace(completion, id=prompt.id, bucket=prompt.bucket.value)
