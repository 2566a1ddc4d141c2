"""How answers open: refusals R and compliances C, the two template sets of C-ΔΘ (arXiv 2602.04521)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

# Below this a fine-tune learns the phrases rather than the act of refusing. The paper has more than 100 of each.
FEWEST = 10
NEEDED = f'Needed is {{"refusal": [...], "compliance": [...]}}, each a list of at least {FEWEST} phrases.'


class OpeningsError(ValueError):
    """A file of opening phrases that cannot be used; the message says what is wrong and what is needed."""


@dataclass(frozen=True)
class Openings:
    """refusal, compliance: opening phrases of answers, in English, that name no request and hold no content."""

    refusal: tuple[str, ...]
    compliance: tuple[str, ...]


def openings() -> Openings:
    """The phrases that come with the package: 160 of each, written for it, Apache-2.0.

    The paper's own are not published. `RuleJudge` calls every refusal here one and no compliance one; six phrases it
    would have misread were worded anew, so these are not a test of that judge.
    """
    with as_file(files(__package__) / "openings.json") as path:
        return read_openings(path)


def read_openings(path: Path | str) -> Openings:
    """Phrases of your own: a JSON object with the lists `refusal` and `compliance`; other keys are not looked at.

    raises OpeningsError for a file that is no such object, holds fewer than 10 of either, an empty phrase, one phrase
    twice, or one in both lists (case and punctuation aside); OSError if it cannot be read
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OpeningsError(f"{path} is not JSON ({error}). {NEEDED}") from None
    if not isinstance(content, dict):
        raise OpeningsError(f"{path} holds a {type(content).__name__}. {NEEDED}")
    found = Openings(_phrases(path, content, "refusal"), _phrases(path, content, "compliance"))
    seen: dict[str, str] = {}
    for phrase in (*found.refusal, *found.compliance):
        if (bare := bare_words(phrase)) in seen:
            raise OpeningsError(f"{path} says the same twice: {seen[bare]!r} and {phrase!r}. Leave one of them out.")
        seen[bare] = phrase
    return found


def bare_words(phrase: str) -> str:
    """Lower case, letters and digits only, single spaces: what two phrases are compared by."""
    letters = "".join(c if c.isalnum() else "" if c in "'’" else " " for c in phrase.lower())
    return " ".join(letters.split())


def _phrases(path: Path, content: dict, key: str) -> tuple[str, ...]:
    if key not in content:
        raise OpeningsError(f"{path} has no {key!r}; its keys are {', '.join(content) or 'none'}. {NEEDED}")
    phrases = content[key]
    if not isinstance(phrases, list) or not all(isinstance(p, str) for p in phrases):
        raise OpeningsError(f"{key!r} of {path} is not a list of strings. {NEEDED}")
    blank = [i for i, phrase in enumerate(phrases) if not bare_words(phrase)]
    if blank:
        raise OpeningsError(f"{key!r} of {path} has no words at position {blank[0]}. Leave it out.")
    if len(phrases) < FEWEST:
        raise OpeningsError(f"{key!r} of {path} has {len(phrases)} phrases. {NEEDED}")
    return tuple(p.strip() for p in phrases)
