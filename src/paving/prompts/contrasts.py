"""Contrast pairs: a safe and an unsafe prompt about one thing, for a router to learn the boundary from."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal

from .leakage import near_pairs, normalised
from .types import Bucket, Prompt, PromptError

ContrastSet = Literal["words", "kinds"]
CONTRAST_SETS: tuple[ContrastSet, ...] = ("words", "kinds")
FIELDS = ("id", "focus", "safe", "unsafe")
DECISIONS = ("accepted", "rejected", None)


def contrast_prompts(name: ContrastSet | None = None) -> tuple[Prompt, ...]:
    """The pairs that come with the package, on focus words beyond the starter set's: the safe prompts (edit), then the
    unsafe ones (harmful keep). None: both sets.

    words  240 words that can be meant either way, in requests of one sentence
    kinds  559 short pairs of the kinds of over-refusal that XSTest tells apart: history, privacy, groups of people,
           definitions, fiction, figures of speech, harmless targets
    """
    found: list[Prompt] = []
    for one in CONTRAST_SETS if name is None else (name,):
        with as_file(files(__package__) / "starter" / f"contrast_{one}.jsonl") as path:
            found += read_contrasts(path)
    return tuple(sorted(found, key=lambda p: p.bucket is not Bucket.EDIT))


def read_contrasts(path: str | Path) -> tuple[Prompt, ...]:
    """A JSONL file of pairs, `id`, `focus`, `safe`, `unsafe` a line. The two prompts of a pair share a group, the focus.

    A line may have a `decision`, as a person's review of drafts leaves it (prompts.drafts): rejected pairs are left out.

    raises PromptError for a file that cannot be read, a line without those four texts, an id that comes twice, or drafts
    that nobody has decided on
    """
    path = Path(path)
    read = read_pairs(path)
    drafts = [pair["id"] for pair in read if pair.get("decision", "accepted") is None]
    if drafts:
        raise PromptError(
            f"{path}: {len(drafts)} of {len(read)} pairs are drafts that nobody has decided on; "
            f"`paving contrast review {path} --out NEW` asks for each."
        )
    pairs = [pair for pair in read if pair.get("decision", "accepted") == "accepted"]
    if not pairs:
        raise PromptError(f"{path} has no contrast pairs" + (f": all {len(read)} are rejected." if read else "."))
    sides = (("safe", Bucket.EDIT), ("unsafe", Bucket.HARMFUL_KEEP))
    return tuple(
        # A run's own prompts may have the same ids: both files are often made from one table.
        Prompt(f"{path.stem}/{pair['id']}-{side}", pair[side], bucket, group=pair["focus"], source=path.stem)
        for side, bucket in sides
        for pair in pairs
    )


def read_pairs(path: str | Path) -> list[dict]:
    """The lines of such a file as they stand. raises PromptError as `read_contrasts` does, but for decisions"""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read the contrast pairs in {path}: {error}.") from None
    pairs = [_pair(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    ids = [pair["id"] for pair in pairs]
    repeated = sorted({i for i in ids if ids.count(i) > 1})
    if repeated:
        raise PromptError(f"{path}: ids come twice: {', '.join(repeated[:10])}.")
    return pairs


def groups_near(pairs: Sequence[Prompt], prompts: Sequence[Prompt]) -> dict[Prompt, frozenset[str]]:
    """A pair's prompt -> the groups, casefolded, which it must not help to judge: its own focus, and those of
    `prompts` whose name stands in either side of its pair, or which a side repeats or nearly repeats, as one drafted from a
    prompt does."""
    texts = list(dict.fromkeys(normalised(p.text) for p in (*pairs, *prompts)))
    close: dict[str, set[str]] = {text: {text} for text in texts}
    for i, j in near_pairs(texts):
        close[texts[i]].add(texts[j])
        close[texts[j]].add(texts[i])
    groups: dict[str, set[str]] = defaultdict(set)
    for prompt in prompts:
        groups[normalised(prompt.text)].add(prompt.group.casefold())
    # A group that is named after its prompt is no word to look for, though no harm would come of it.
    named = {p.group.casefold() for p in prompts if p.group != p.id}
    named = {name for name in named if len(re.findall(r"[^\W\d_]", name)) > 2}  # no word: "-", "17", "a"
    patterns = {name: focus_word(re.sub(r"[\s_-]+", " ", name).strip()) for name in named}
    found: dict[str, set[str]] = defaultdict(set)
    for p in pairs:
        found[pair_of(p)] |= {name for name, pattern in patterns.items() if pattern.search(p.text)}
        found[pair_of(p)] |= {p.group.casefold()}.union(*(groups[t] for t in close[normalised(p.text)] if t in groups))
    return {p: frozenset(found[pair_of(p)]) for p in pairs}


def focus_word(word: str) -> re.Pattern[str]:
    """The word with the regular endings of a verb and of who does it, on the first of several: kills, stabbing, executed,
    sniper, wiping out."""
    first, space, rest = word.partition(" ")
    stem, last = re.escape(first[:-1]), re.escape(first[-1:])
    verb = rf"{stem}(?:e|es|ed|ing|[eo]rs?|ions?)" if last == "e" else rf"{stem}{last}(?:{last}?(?:ed|ing|ers?)|e?s)?"
    return re.compile(rf"\b({verb}){space}{re.escape(rest)}\b", re.IGNORECASE)


def pair_of(prompt: Prompt) -> str:
    """What the ids of a pair's two prompts have in common."""
    return prompt.id.removesuffix("-safe" if prompt.bucket is Bucket.EDIT else "-unsafe")


def _pair(line: str, where: str) -> dict:
    try:
        pair = json.loads(line)
    except ValueError as error:
        raise PromptError(f"{where}: not JSON ({error}).") from None
    if not isinstance(pair, dict) or not all(isinstance(pair.get(f), str) and pair[f].strip() for f in FIELDS):
        raise PromptError(f"{where}: a contrast pair has the texts {', '.join(FIELDS)}; give all four.")
    if pair.get("decision", "accepted") not in DECISIONS:
        raise PromptError(f"{where}: decision is {pair['decision']!r}; allowed are accepted, rejected and null.")
    return pair
