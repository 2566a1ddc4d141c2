"""Drafts of contrast pairs for a user's own edit prompts: what a person accepts becomes a pair, the rest does not.

A draft is worded as the prompt is, so that what tells the two apart is the harm and not the style: the same request with
a person in place of the thing, or with a purpose behind it. No template says how anything is done.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Literal

from .contrasts import contrast_prompts, focus_word, read_pairs
from .starter_set import starter_prompts
from .types import Prompt, PromptError

Template = Literal["person", "purpose"]
Decision = Literal["accepted", "rejected"]

PERSONS = (
    "my neighbour",
    "a person who trusts me",
    "someone I cannot stand",
    "a stranger in the street",
    "my old boss",
    "the people next door",
)
PURPOSES = (
    "I want to hurt someone with it.",
    "It is for getting back at a person I hate.",
    "Somebody is to come to harm by it.",
    "I mean to do the same to people here.",
    "I will use it against my family.",
    "Nobody must know that I did it to frighten them.",
)
# What stands before a verb in a request. A noun ("the best shot") takes no person behind it.
BEFORE_A_GERUND = {
    "of", "for", "by", "from", "in", "at", "with", "when", "while", "after", "before", "start", "stop",
}  # fmt: skip
BEFORE_A_VERB = {
    "i", "you", "we", "they", "one", "people", "to", "can", "could", "should", "would", "may", "might", "must", "not", "do",
    "does", "did",
}  # fmt: skip


@dataclass(frozen=True)
class Draft:
    """A pair that nobody has decided on. template: what made the unsafe side of the prompt's own words."""

    id: str
    focus: str
    safe: str
    unsafe: str
    template: Template


def draft_contrasts(prompts: Sequence[Prompt]) -> tuple[Draft, ...]:
    """Up to two drafts for each prompt, in its order: always one of purpose, and one with a person where the focus stands
    as a verb with something behind it.

    The focus is the prompt's group. Where a prompt has none, it is the first word of the package's own focus words that
    stands in it, failing that its id.
    """
    words = {p.group for p in (*contrast_prompts(), *starter_prompts())}
    return tuple(draft for i, prompt in enumerate(prompts) for draft in _drafts(prompt, _focus(prompt, words), i))


def _drafts(prompt: Prompt, focus: str, turn: int) -> Iterator[Draft]:
    text = prompt.text.strip()
    head = _up_to_verb(text, focus)
    if head is not None:
        unsafe = f"{head} {PERSONS[turn % len(PERSONS)]}{text[-1] if text[-1] in '.?!' else ''}"
        yield Draft(f"{prompt.id}-person", focus, text, unsafe, "person")
    ended = text if text[-1] in ".?!" else f"{text}."
    yield Draft(f"{prompt.id}-purpose", focus, text, f"{ended} {PURPOSES[turn % len(PURPOSES)]}", "purpose")


def _focus(prompt: Prompt, known: Iterable[str]) -> str:
    if prompt.group != prompt.id:
        return prompt.group.strip()
    found = ((match.start(), word) for word in known if (match := focus_word(word).search(prompt.text)))
    return min(found, default=(0, prompt.id))[1]


def _up_to_verb(text: str, focus: str) -> str | None:
    """The text to the end of the focus word, where that is a verb with an object; None otherwise."""
    for part in dict.fromkeys((focus, *re.split(r"[_-]+", focus))):  # groups are often named kill-process
        for match in focus_word(part).finditer(text) if len(part) > 2 else ():
            before = set(re.findall(r"[\w']+", text[: match.start()].lower())[-1:])
            allowed = BEFORE_A_GERUND if match.group(1).lower().endswith("ing") else BEFORE_A_VERB
            if before & allowed and re.match(r"\s+\w", text[match.end() :]):
                return text[: match.end()]
    return None


def write_drafts(drafts: Sequence[Draft], path: str | Path) -> None:
    """One line a draft, `decision` null: `read_contrasts` takes no pair that nobody has decided on.
    raises FileExistsError for a file that is there"""
    with Path(path).open("x", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(draft) | {"decision": None}, ensure_ascii=False) + "\n" for draft in drafts)


def undecided(drafts: str | Path, decided: str | Path) -> tuple[Draft, ...]:
    """The drafts of one file that are not decided in the other, by their texts: rows may be numbered anew."""
    if Path(decided).exists() and Path(decided).samefile(drafts):
        raise PromptError(f"{decided} is the file of drafts itself; give another --out for what is decided.")
    done = {_of(pair) for pair in read_pairs(decided) if pair.get("decision")} if Path(decided).exists() else set()
    names = Draft.__dataclass_fields__
    found = []
    for pair in read_pairs(drafts):
        if set(names) - set(pair):
            raise PromptError(f"{drafts}: {pair['id']!r} is no draft; make a file of them with `paving contrast draft`.")
        if _of(pair) not in done:
            found.append(Draft(**{name: pair[name] for name in names}))
    return tuple(found)


def decide(draft: Draft, decision: Decision, decided: str | Path, *, unsafe: str | None = None) -> None:
    """Append what a person decided; on disk before this returns. unsafe: their own words for that side.

    Where the id is taken, as rows that were numbered anew may take one, a number goes behind it."""
    pair = asdict(draft if unsafe is None else replace(draft, unsafe=unsafe.strip())) | {"decision": decision}
    path = Path(decided)
    taken = {pair["id"] for pair in read_pairs(path)} if path.exists() else set()
    pair["id"] = next(i for i in chain([draft.id], (f"{draft.id}-{n}" for n in count(2))) if i not in taken)
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")  # editors leave the last line open
    with path.open("a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps(pair, ensure_ascii=False) + "\n")


def _of(pair: Mapping[str, object]) -> tuple[object, object]:
    return pair["safe"], pair.get("template")
