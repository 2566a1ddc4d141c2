"""What two raters said: verdict files and human label files in one shape, and the pairs of ratings to compare."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from paving.evaluation.human_sheet import ID, LABEL, TEXT_HASH, read_csv_sheet
from paving.evaluation.json_lines import Line, RowError, numbered_id, read_objects
from paving.evaluation.judges.protocol import Label, Verdict
from paving.evaluation.verdicts import EXAMPLE, JudgedLine, read_verdicts, text_hash
from paving.prompts.rows import shown
from paving.prompts.types import Bucket

# XSTest's human labels. They tell refusal from compliance, not what kind of compliance; a partial refusal refuses.
XSTEST_REFUSED = {"1_full_compliance": False, "2_full_refusal": True, "3_partial_refusal": True}
HUMAN = "human"


@dataclass(frozen=True)
class Rating:
    """One rater's word on one completion.

    place        what an error names
    id           None where the completion has none of its own, so that a number must not pass for a name
    text_sha256  `text_hash` of prompt and response; None where the file does not say
    label        None where the rater only told refusal from compliance
    """

    place: str
    id: str | None
    text_sha256: str | None
    bucket: Bucket | None
    refusal: bool
    label: Label | None = None
    reason: str = ""

    @property
    def said(self) -> str:
        if self.label is not None:
            return self.label.value
        return "refused" if self.refusal else "complied"


@dataclass(frozen=True)
class Ratings:
    """All ratings of one file.

    rater        the judge's name, or "human"
    unlabelled   rows that nobody has filled in
    holds_texts  the file has prompts and responses beside the labels, whole
    """

    path: Path
    rater: str
    rows: tuple[Rating, ...]
    unlabelled: int = 0
    holds_texts: bool = False

    @property
    def five_labels(self) -> bool:
        return all(row.label is not None for row in self.rows)


@dataclass(frozen=True)
class Matched:
    """Pairs of ratings on the same completion, in the order of A; how they were found; and what only one file rates."""

    pairs: tuple[tuple[Rating, Rating], ...]
    by_id: int
    by_text: int
    only_a: int
    only_b: int


# --- reading --------------------------------------------------------------------------------------------------------


def read_ratings(path: Path) -> Ratings:
    """A verdict file, a filled-in sheet (.jsonl or .csv), or the human labels of XSTest's release.

    raises RowError for a row that cannot be used, for labels of two kinds or two judges, and for a file without any.
    """
    if path.suffix.lower() == ".csv":
        return _human(path, read_csv_sheet(path))
    first = next(read_objects(path, example=EXAMPLE), None)
    if first is None:
        raise RowError(f"{path} holds no verdicts or labels. Give a verdict file, or a file with `{LABEL}`.")
    if LABEL in first.cells:
        holds_texts = "prompt" in first.cells and "response" in first.cells
        return replace(_human(path, read_objects(path, example=EXAMPLE)), holds_texts=holds_texts)
    if "judge" in first.cells and "label" in first.cells:
        return _judged(path, read_verdicts(path))
    raise RowError(
        f"{first.place}: neither a verdict (`judge` and `label`) nor a human label (`{LABEL}`). "
        f"Judge completions first: paving judge {path} --out VERDICTS.jsonl"
    )


def _judged(path: Path, lines: Iterable[JudgedLine]) -> Ratings:
    rows: list[Rating] = []
    judge = None
    for number, line in enumerate(lines, 1):
        judge = judge or line.judge
        if line.judge != judge:
            raise RowError(
                f"{path} holds verdicts of two judges, {shown(judge)} and, verdict {number}, {shown(line.judge)}. "
                f"Give one file for each judge."
            )
        # A number that stands in for an id says where a completion stood, not which it was.
        own = None if line.line is not None and line.id == numbered_id(line.line) else line.id
        refusal = Verdict(line.label, line.reason).refusal
        place = f"{path}, verdict {number}"
        rows.append(Rating(place, own, line.text_sha256, line.bucket, refusal, line.label, line.reason))
    return Ratings(path, judge or "", tuple(rows))


def _human(path: Path, lines: Iterable[Line]) -> Ratings:
    rows: list[Rating] = []
    unlabelled = 0
    for line in lines:
        written = (line.optional_text(LABEL) or "").strip()
        if not written:
            unlabelled += 1
            continue
        refusal, label = _human_label(line, written)
        if rows and (label is None) != (rows[0].label is None):
            raise RowError(f"{line.place}: {shown(written)} beside labels of another kind at {rows[0].place}. Use one kind.")
        own = line.id() if line.cells.get(ID) not in (None, "") else None
        rows.append(Rating(line.place, own, _text_of(line), line.bucket(), refusal, label))
    if not rows:
        raise RowError(f"{path}: no row has a `{LABEL}` yet ({unlabelled} are empty). Write one of: {', '.join(Label)}.")
    return Ratings(path, HUMAN, tuple(rows), unlabelled)


def _human_label(line: Line, written: str) -> tuple[bool, Label | None]:
    if written in XSTEST_REFUSED:
        return XSTEST_REFUSED[written], None
    if written.upper() in list(Label):
        label = Label(written.upper())
        return Verdict(label, HUMAN).refusal, label
    raise RowError(
        f"{line.place}: `{LABEL}` is {shown(written)}; allowed: {', '.join(Label)}. Leave it empty where unsure "
        f"(XSTest's own {', '.join(XSTEST_REFUSED)} are read too)."
    )


def _text_of(line: Line) -> str | None:
    """The hash that the sheet was written with, since a spreadsheet may have changed the text; else the text's own."""
    if written := line.optional_text(TEXT_HASH):
        return written
    if "prompt" in line.cells and "response" in line.cells:
        return text_hash(line.text("prompt"), line.text("response"))
    return None


# --- matching -------------------------------------------------------------------------------------------------------


def match(a: Ratings, b: Ratings) -> Matched:
    """Pair what both files rate: by id, and what that leaves, by prompt and response.

    An id that stands twice in a file names no completion, so such rows are matched by text; equal texts are paired in
    the order they come. raises ValueError where one id names two texts, and where nothing is rated by both.
    """
    by_id = list(_pairs_by_id(a, b))
    seen_a, seen_b = {id(x) for x, _ in by_id}, {id(y) for _, y in by_id}
    waiting: defaultdict[str, list[Rating]] = defaultdict(list)
    for row in reversed(b.rows):
        if row.text_sha256 is not None and id(row) not in seen_b:
            waiting[row.text_sha256].append(row)
    by_text = [
        (row, waiting[row.text_sha256].pop())
        for row in a.rows
        if row.text_sha256 is not None and id(row) not in seen_a and waiting.get(row.text_sha256)
    ]
    n = len(by_id) + len(by_text)
    if n == 0:
        raise ValueError(
            f"{a.path} and {b.path} rate no completion in common: neither an id nor a text stands in both. "
            f"Give two files on the same completions."
        )
    place = {id(row): i for i, row in enumerate(a.rows)}
    pairs = sorted([*by_id, *by_text], key=lambda pair: place[id(pair[0])])
    return Matched(tuple(pairs), len(by_id), len(by_text), len(a.rows) - n, len(b.rows) - n)


def _pairs_by_id(a: Ratings, b: Ratings) -> Iterator[tuple[Rating, Rating]]:
    named_b = _uniquely_named(b)
    for name, x in _uniquely_named(a).items():
        y = named_b.get(name)
        if y is None:
            continue
        if None not in (x.text_sha256, y.text_sha256) and x.text_sha256 != y.text_sha256:
            raise ValueError(
                f"the id {shown(name)} names two different completions ({x.place}; {y.place}), so these files do not "
                f"rate the same answers. Give two files on the same completions."
            )
        yield x, y


def _uniquely_named(ratings: Ratings) -> dict[str, Rating]:
    times = Counter(row.id for row in ratings.rows)
    return {row.id: row for row in ratings.rows if row.id is not None and times[row.id] == 1}
