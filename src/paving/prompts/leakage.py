"""Find prompts that stand where a run would test what it trained on, and keep near duplicates on one side of a split.

What counts, and why:

exact between buckets  one text with two contradictory orders, to edit and to keep: wrong in whatever splits it stands
exact between splits   the held-out figure would be a training figure, whatever the bucket
near between splits    the same, but within one bucket only. An edit prompt and its unsafe contrast are worded alike on
                       purpose ("kill a process", "kill a person"); telling them apart is what is measured, and they
                       share a group, so they stand on one side anyway
group between splits   prompts that their owner said belong together

Exact means equal in `normalised` text. Near means that the sets of character 5-grams of two normalised texts have a
Jaccard similarity of at least 0.8: a changed word in a long prompt, not a changed topic in a short one.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from .types import Bucket, Prompt, PromptError, SplitName, Splits

SHINGLE = 5  # characters
NEAR = Fraction(4, 5)  # a fraction, so that a similarity of exactly 0.8 is near on every machine
MEETINGS = 8  # k in near_pairs: any value is right; with 1, 5000 prompts of one template took 30 s, with 8 they take 4 s
NAMED = 10  # how many findings, and ids of one finding, a message names before it only counts

Kind = Literal["exact between buckets", "exact between splits", "near between splits", "group between splits"]


@dataclass(frozen=True)
class Finding:
    """ids: the prompts concerned, two or more; where: `split/bucket` of each, in the same order."""

    kind: Kind
    ids: tuple[str, ...]
    where: tuple[str, ...]

    def __str__(self) -> str:
        named = [f"{i} ({w})" for i, w in zip(self.ids, self.where, strict=True)]
        more = [f"and {len(named) - NAMED} more"] if len(named) > NAMED else []
        return f"{self.kind}: " + ", ".join(named[:NAMED] + more)


@dataclass(frozen=True)
class Leakage:
    """Everything found, in the order of the kinds in the module's docstring. Falsy when nothing was."""

    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        return bool(self.findings)

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings)) or "no leakage found"

    def counts(self) -> dict[str, int]:
        return dict(Counter(finding.kind for finding in self.findings))


def find_leakage(splits: Splits) -> Leakage:
    """Duplicates and shared groups of the splits. A prompt can be in several findings; each says something else."""
    placed = [(p, name) for name in SplitName for p in splits.of(name)]
    by_text: dict[str, list[tuple[Prompt, SplitName]]] = defaultdict(list)
    by_group: dict[str, list[tuple[Prompt, SplitName]]] = defaultdict(list)
    for prompt, name in placed:
        by_text[normalised(prompt.transcript)].append((prompt, name))
        by_group[prompt.group].append((prompt, name))
    findings = [_finding("exact between buckets", c) for c in by_text.values() if len({p.bucket for p, _ in c}) > 1]
    findings += [_finding("exact between splits", c) for c in by_text.values() if len({name for _, name in c}) > 1]
    findings += _near_between_splits(by_text)
    findings += [_finding("group between splits", c) for c in by_group.values() if len({name for _, name in c}) > 1]
    return Leakage(tuple(findings))


def refuse_leakage(splits: Splits, *, allow: bool) -> Leakage:
    """What `find_leakage` found, for the record of the run. Raises PromptError if it is anything, unless `allow`."""
    leakage = find_leakage(splits)
    if leakage and not allow:
        named = "\n".join(f"  {finding}" for finding in leakage.findings[:NAMED])
        more = len(leakage.findings) - NAMED
        raise PromptError(
            f"the splits leak, {', '.join(f'{n} {kind}' for kind, n in leakage.counts().items())}:\n{named}\n"
            + (f"  and {more} more\n" if more > 0 else "")
            + "Held-out figures would partly be training figures. Remove one prompt of each, or give the prompts of a "
            "finding the same `group` and split anew (group_near_duplicates does it for near ones); "
            "--allow-leakage runs with them and says so in the report."
        )
    return leakage


def drop_exact_duplicates(prompts: Iterable[Prompt]) -> tuple[tuple[Prompt, ...], tuple[str, ...]]:
    """(kept, ids of the dropped): of equal prompts in one bucket, the one with the smallest id stays.

    To be called before splitting. Equal prompts in different buckets all stay: which of them is right is for their
    owner to say, and `refuse_leakage` asks.
    """
    prompts = tuple(prompts)
    first: dict[tuple[Bucket, str], str] = {}
    for p in sorted(prompts, key=lambda p: p.id):
        first.setdefault((p.bucket, normalised(p.transcript)), p.id)
    stays = set(first.values())
    return tuple(p for p in prompts if p.id in stays), tuple(p.id for p in prompts if p.id not in stays)


def group_near_duplicates(prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
    """The same prompts, with the groups of near or exact duplicates within a bucket merged into one.

    The merged group has the smallest of the names. Chains merge as a whole: if a is near b and b near c, all three are
    one group, else b would leak to one side or the other.
    """
    prompts = tuple(prompts)
    parent = {p.group: p.group for p in prompts}

    def root(group: str) -> str:
        while parent[group] != group:
            parent[group] = parent[parent[group]]
            group = parent[group]
        return group

    for bucket in Bucket:
        groups: dict[str, set[str]] = defaultdict(set)
        for p in prompts:
            if p.bucket == bucket:
                groups[normalised(p.transcript)].add(p.group)
        texts = list(groups)
        near = ((texts[i], texts[j]) for i, j in near_pairs(texts))
        for a, b in [*((text, text) for text in texts), *near]:
            low, *others = sorted({root(group) for group in groups[a] | groups[b]})
            for other in others:
                parent[other] = low
    return tuple(replace(p, group=root(p.group)) for p in prompts)


def normalised(text: str) -> str:
    """NFKC, casefolded, without punctuation, spaces collapsed: what two prompts must share to count as the same.

    Symbols such as + and $ stay, as "C" and "C++" are two questions. A text of punctuation alone stays as it is.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    kept = "".join(c for c in folded if not unicodedata.category(c).startswith("P"))
    return " ".join(kept.split()) or " ".join(folded.split())


def near_pairs(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs i < j of normalised texts that are near or equal.

    Exact, and without comparing all pairs. Order each text's shingles from rare to common. Two near sets share at least
    m = ceil(t |x|) shingles, so the first |x| - m + k of each have at least k in common (with k = 1 Chaudhuri et al.
    2006, with more Wang et al. 2012), and only texts that meet so often there are compared: shingles of openings like
    "how do i " are common and stand behind. A set with m < k has all its shingles looked up, so the k of the other set
    is enough for both.
    """
    sets = [shingles(text) for text in texts]
    frequency = Counter(shingle for s in sets for shingle in s)
    met: dict[str, list[int]] = defaultdict(list)
    for j, mine in enumerate(sets):
        must_share = _must_share(mine)
        k = min(MEETINGS, must_share)
        meetings: Counter[int] = Counter()
        for shingle in sorted(mine, key=lambda s: (frequency[s], s))[: len(mine) - must_share + k]:
            meetings.update(met[shingle])
            met[shingle].append(j)
        for i in sorted(i for i, n in meetings.items() if n >= k):
            if are_near(sets[i], mine):
                yield i, j


def near_or_equal(texts: Sequence[str], to: Sequence[str]) -> set[str]:
    """Those of `texts` whose normalised form is near or equal to that of a text of `to`."""
    mine, theirs = {normalised(t) for t in texts}, {normalised(t) for t in to}
    every = [*theirs, *(mine - theirs)]
    found = mine & theirs
    found |= {every[j] for i, j in near_pairs(every) if i < len(theirs) <= j}
    return {t for t in texts if normalised(t) in found}


def shingles(text: str) -> frozenset[str]:
    """The character 5-grams of a text, or the text itself when it is shorter; never empty."""
    return frozenset(text[k : k + SHINGLE] for k in range(max(1, len(text) - SHINGLE + 1)))


def are_near(a: frozenset[str], b: frozenset[str]) -> bool:
    shared = len(a & b)
    return shared * NEAR.denominator >= NEAR.numerator * (len(a) + len(b) - shared)


def _must_share(shingles: frozenset[str]) -> int:
    """ceil(NEAR * size): how many shingles a set has in common with any set that is near to it."""
    return -(-NEAR.numerator * len(shingles) // NEAR.denominator)


def _near_between_splits(by_text: dict[str, list[tuple[Prompt, SplitName]]]) -> list[Finding]:
    texts = list(by_text)
    return [
        _finding("near between splits", [a, b])
        for i, j in near_pairs(texts)
        for a in by_text[texts[i]]
        for b in by_text[texts[j]]
        if a[0].bucket == b[0].bucket and a[1] != b[1]
    ]


def _finding(kind: Kind, prompts: list[tuple[Prompt, SplitName]]) -> Finding:
    return Finding(kind, tuple(p.id for p, _ in prompts), tuple(f"{name.value}/{p.bucket.value}" for p, name in prompts))
