"""A stratified sample of judged completions for people to label: a sheet as JSON lines and as CSV, and back."""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from paving.evaluation.json_lines import Line, RowError, names
from paving.evaluation.judges.answers import Answer, read_answers
from paving.evaluation.judges.protocol import Label
from paving.evaluation.verdicts import JudgedLine, read_verdicts, text_hash
from paving.prompts.rows import shown
from paving.prompts.types import Bucket

ID = "id"
LABEL = "human_label"
TEXT_HASH = "text_sha256"
# The judge's own label is left out: who has read it no longer judges alone.
COLUMNS = (ID, "bucket", "truncated", "prompt", "response", LABEL, TEXT_HASH)
# Spreadsheets cut a cell at 32,767 characters. The JSON lines hold every text whole, and rows are matched by their hash.
MAX_CELL = 32_000
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")

Stratum = tuple[Label, Bucket | None]


@dataclass(frozen=True)
class Sheet:
    """What `write_sheet` wrote. strata: (label, bucket) -> (rows in the sheet, verdicts in the file)."""

    jsonl: Path
    csv: Path
    strata: Mapping[Stratum, tuple[int, int]]

    @property
    def n(self) -> int:
        return sum(taken for taken, _ in self.strata.values())


def write_sheet(verdicts: Path, completions: Path, n: int, out: Path, *, seed: int = 0) -> Sheet:
    """Sample n verdicts by label and bucket, and write prompt, response and an empty `human_label` for each.

    Strata are taken in proportion, each at least once where n allows, so that the sample speaks for the file; rows are
    in random order. With fewer than n verdicts the sheet holds all of them. The files stand at `out` (.jsonl) and, the
    same rows, beside it as .csv. The same seed gives the same sheet.

    raises FileExistsError where either exists: labels somebody wrote are never overwritten.
    """
    if n < 1:
        raise ValueError(f"a sample of {n} holds nothing to label. Give --n 1 or more.")
    if out.suffix != ".jsonl":
        raise ValueError(f"{out} must end in .jsonl; the same sheet is written beside it as .csv.")
    paths = (out, out.with_suffix(".csv"))
    for path in paths:
        if path.exists():
            raise FileExistsError(f"{path} exists already and may hold labels; give another --out. Nothing was overwritten.")
    sizes = Counter((line.label, line.bucket) for line in read_verdicts(verdicts))
    if not sizes:
        raise RowError(f"{verdicts} holds no verdicts. Judge completions first: paving judge COMPLETIONS.jsonl --out ...")
    taken = allocate(sizes, n)
    chosen = _choose(verdicts, sizes, taken, seed)
    rows = [_row(line, answer) for line, answer in _with_texts(chosen, verdicts, completions)]
    random.Random(seed).shuffle(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, content in zip(paths, (_as_jsonl(rows), _as_csv(rows)), strict=True):
        # Half a surrogate pair, which no UTF-8 can hold, is written as its escape; in JSON that reads back as it was.
        with path.open("x", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(content)
    return Sheet(*paths, {stratum: (taken[stratum], size) for stratum, size in sizes.items()})


# --- which rows -----------------------------------------------------------------------------------------------------


def allocate(sizes: Mapping[Stratum, int], n: int) -> dict[Stratum, int]:
    """How many rows of each stratum: in proportion, by largest remainder, and at least one each if n suffices for that.

    returns counts that add up to min(n, all rows), none above its stratum's size.
    """
    total = sum(sizes.values())
    n = min(n, total)
    least = 1 if n >= len(sizes) else 0
    share = {s: n * size / total for s, size in sizes.items()}
    taken = {s: min(sizes[s], max(least, int(share[s]))) for s in sizes}
    order = sorted(sizes, key=lambda s: (taken[s] - share[s], _name(s)))
    while (left := n - sum(taken.values())) != 0:
        # One round gives or takes one row each, first where the share is missed most.
        able = [s for s in order if taken[s] < sizes[s]] if left > 0 else [s for s in order[::-1] if taken[s] > least]
        for s in able[: abs(left)]:
            taken[s] += 1 if left > 0 else -1
    return taken


def _name(stratum: Stratum) -> tuple[str, str]:
    label, bucket = stratum
    return label.value, bucket.value if bucket is not None else ""


def _choose(verdicts: Path, sizes: Mapping[Stratum, int], taken: Mapping[Stratum, int], seed: int) -> list[JudgedLine]:
    dice = random.Random(seed)
    places = {s: set(dice.sample(range(sizes[s]), taken[s])) for s in sorted(sizes, key=_name)}
    seen: Counter[Stratum] = Counter()
    chosen = []
    for line in read_verdicts(verdicts):
        stratum = (line.label, line.bucket)
        if seen[stratum] in places[stratum]:
            chosen.append(line)
        seen[stratum] += 1
    return chosen


def _with_texts(chosen: list[JudgedLine], verdicts: Path, completions: Path) -> Iterator[tuple[JudgedLine, Answer]]:
    """raises ValueError where the completions are not those that were judged."""
    wanted = {(line.id, line.text_sha256) for line in chosen}
    found: dict[tuple[str, str | None], Answer] = {}
    for answer in read_answers(completions):
        # A run's own verdicts say which id they are on, and not which text.
        for name in ((answer.id, text_hash(answer.prompt, answer.response)), (answer.id, None)):
            if name in wanted:
                found.setdefault(name, answer)
    for line in chosen:
        answer = found.get((line.id, line.text_sha256))
        if answer is None:
            raise ValueError(
                f"{verdicts} judges a completion {shown(line.id)} that {completions} does not hold. "
                f"Give the completions file that was judged."
            )
        yield line, answer


# --- the sheet ------------------------------------------------------------------------------------------------------


def _row(line: JudgedLine, answer: Answer) -> dict[str, object]:
    values = (line.id, line.bucket, answer.truncated, answer.prompt, answer.response, "",
              text_hash(answer.prompt, answer.response))  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def _as_jsonl(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _as_csv(rows: list[dict[str, object]]) -> str:
    file = io.StringIO(newline="")
    file.write("\ufeff")  # without the mark, spreadsheets read UTF-8 as an old code page
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([guarded(_cell(row[column])) for column in COLUMNS])
    return file.getvalue()


def _cell(value: object) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= MAX_CELL else f"{text[:MAX_CELL]} [cut; the .jsonl sheet holds the whole text]"


def guarded(cell: str) -> str:
    """A cell that no spreadsheet runs as a formula: a completion may be hostile."""
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def unguarded(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell


def read_csv_sheet(path: Path) -> Iterator[Line]:
    """The rows of a sheet that somebody filled in with a spreadsheet, as lines with `id`, `human_label` and the hash.

    raises RowError for a file that is no such sheet; the separator may be a comma, a semicolon or a tab.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}. Give a sheet written by: paving sample")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise RowError(f"{path}: not UTF-8 at byte {exc.start}. Save the sheet as CSV UTF-8.") from exc
    head = text.partition("\n")[0]
    # Spreadsheets separate by what the locale has: semicolons where the comma is the decimal sign.
    separator = max(",;\t", key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        place = f"{path}:{number}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as exc:
            raise RowError(f"{place}: not CSV ({exc}). Save the sheet from the spreadsheet again.") from exc
        if not any(cells):
            continue
        if header is None:
            header = cells
            if missing := [c for c in (ID, LABEL, TEXT_HASH) if c not in header]:
                raise RowError(f"{place}: no {names(missing)} in the header ({names(header)}). Keep the sheet's columns.")
            continue
        if len(cells) != len(header):
            raise RowError(f"{place}: {len(cells)} cells where the header has {len(header)}. Save the sheet again.")
        row = dict(zip(header, map(unguarded, cells), strict=True))
        yield Line(place, number, {c: row[c] or None for c in (ID, "bucket", LABEL, TEXT_HASH) if c in row})
