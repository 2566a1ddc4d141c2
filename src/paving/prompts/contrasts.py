"""Contrast pairs: a safe and an unsafe prompt about one thing, for a router to learn the boundary from."""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal

from .types import Bucket, Prompt, PromptError

ContrastSet = Literal["words", "kinds"]
CONTRAST_SETS: tuple[ContrastSet, ...] = ("words", "kinds")
FIELDS = ("id", "focus", "safe", "unsafe")


def contrast_prompts(name: ContrastSet | None = None) -> tuple[Prompt, ...]:
    """The pairs that come with the package, on focus words beyond the starter set's: the safe prompts (edit), then the
    unsafe ones (harmful keep). None: both sets.

    words  240 words that can be meant either way, in requests of one sentence
    kinds  197 short pairs of the kinds of over-refusal that XSTest tells apart: history, privacy, groups of people,
           definitions, fiction, figures of speech, harmless targets
    """
    found: list[Prompt] = []
    for one in CONTRAST_SETS if name is None else (name,):
        with as_file(files(__package__) / "starter" / f"contrast_{one}.jsonl") as path:
            found += read_contrasts(path)
    return tuple(sorted(found, key=lambda p: p.bucket is not Bucket.EDIT))


def read_contrasts(path: str | Path) -> tuple[Prompt, ...]:
    """A JSONL file of pairs, `id`, `focus`, `safe`, `unsafe` a line. The two prompts of a pair share a group, the focus.

    raises PromptError for a file that cannot be read, a line without those four texts, or an id that comes twice
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read the contrast pairs in {path}: {error}.") from None
    pairs = [_pair(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    ids = [pair["id"] for pair in pairs]
    repeated = sorted({i for i in ids if ids.count(i) > 1})
    if repeated or not pairs:
        raise PromptError(
            f"{path} has no contrast pairs." if not pairs else f"{path}: ids come twice: {', '.join(repeated[:10])}."
        )
    sides = (("safe", Bucket.EDIT), ("unsafe", Bucket.HARMFUL_KEEP))
    return tuple(
        # A run's own prompts may have the same ids: both files are often made from one table.
        Prompt(f"{path.stem}/{pair['id']}-{side}", pair[side], bucket, group=pair["focus"], source=path.stem)
        for side, bucket in sides
        for pair in pairs
    )


def _pair(line: str, where: str) -> dict[str, str]:
    try:
        pair = json.loads(line)
    except ValueError as error:
        raise PromptError(f"{where}: not JSON ({error}).") from None
    if not isinstance(pair, dict) or not all(isinstance(pair.get(f), str) and pair[f].strip() for f in FIELDS):
        raise PromptError(f"{where}: a contrast pair has the texts {', '.join(FIELDS)}; give all four.")
    return pair
