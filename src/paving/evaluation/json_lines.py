"""JSON lines, one object after another in constant memory; every complaint names the file and the line."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from paving.prompts.rows import shown
from paving.prompts.types import Bucket

# Far beyond any completion. Without a bound, a file without line ends would be read into memory as one line.
MAX_LINE_BYTES = 64 * 2**20


class RowError(ValueError):
    """A completions, verdict or label file that cannot be used as it is; the message says what, where, and the mend."""


@dataclass(frozen=True)
class Line:
    """place: what an error names (`path:line`); number: 1-based line of the file, blank lines counted."""

    place: str
    number: int
    cells: Mapping[str, object]

    def text(self, name: str) -> str:
        """A field that must be there. raises RowError where it is missing or no string."""
        if name not in self.cells:
            raise RowError(f"{self.place}: no `{name}`; the line has {names(self.cells)}. Add it, or drop the line.")
        value = self.cells[name]
        if not isinstance(value, str):
            raise RowError(f"{self.place}: `{name}` is {shown(value)}, which is no string. Put it in quotes.")
        return value

    def optional_text(self, name: str) -> str | None:
        """None where the field is absent or null. raises RowError where it is something else than a string."""
        return None if self.cells.get(name) is None else self.text(name)

    def flag(self, name: str) -> bool:
        """False where the field is absent or null. raises RowError where it is something else than true or false."""
        value = self.cells.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise RowError(f"{self.place}: `{name}` is {shown(value)}; allowed: true or false, without quotes.")
        return value

    def bucket(self) -> Bucket | None:
        """None where the field is absent or null. raises RowError for a bucket that is none of the three."""
        value = self.cells.get("bucket")
        if value is None:
            return None
        if value not in list(Bucket):
            raise RowError(
                f"{self.place}: `bucket` is {shown(value)}; allowed: {', '.join(Bucket)}. "
                f"Correct it, or leave it out where the bucket is not known."
            )
        return Bucket(value)

    def id(self) -> str:
        """The row's own id as a string, or `line-<number>`: stable as long as the file is. raises RowError."""
        value = self.cells.get("id")
        if value is None or (isinstance(value, str) and not value.strip()):
            return numbered_id(self.number)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.text("id")


def names(fields: Collection[str], limit: int = 12) -> str:
    """Field names for a message; they come from a file, so neither their number nor what they hold is trusted."""
    more = len(fields) - limit
    return ", ".join(map(shown, list(fields)[:limit])) + (f" and {more} more" if more > 0 else "") or "no fields"


def numbered_id(number: int) -> str:
    """The id of a row that brought none."""
    return f"line-{number}"


def read_objects(path: Path, *, example: str, torn_tail: bool = False) -> Iterator[Line]:
    """The objects of a JSON lines file in its order; blank lines are skipped, a byte order mark is not.

    example:    what a good line looks like, for the messages
    torn_tail:  a last line without its line end, as a kill leaves it, is not there

    raises RowError for a line that is no JSON object in UTF-8, and FileNotFoundError where there is no file.
    """
    if not path.is_file():
        # Files are read more than once, so a pipe or /dev/stdin will not do either.
        raise FileNotFoundError(f"there is no file {path}. Give the path of a JSON lines file, such as {example} a line.")
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if torn_tail and not raw.endswith(b"\n"):
                return
            if raw.strip():
                place = f"{path}:{number}"
                yield Line(place, number, _object(raw, place, first=number == 1, example=example))


def _object(raw: bytes, place: str, *, first: bool, example: str) -> Mapping[str, object]:
    if len(raw) > MAX_LINE_BYTES:
        raise RowError(
            f"{place}: longer than {MAX_LINE_BYTES // 2**20} MiB. Write one completion a line, each line with its end."
        )
    try:
        # utf-8-sig: editors put a byte order mark in front, which JSON does not allow.
        text = raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as exc:
        raise RowError(
            f"{place}: not UTF-8 (byte 0x{exc.object[exc.start]:02x} at position {exc.start} of the line). "
            f"Save the file as UTF-8, for example: iconv -f latin1 -t utf-8"
        ) from exc
    try:
        cells = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise RowError(f"{place}: not JSON ({exc}). Each line is one object, such as {example}.") from exc
    if not isinstance(cells, dict):
        raise RowError(f"{place}: {shown(cells)} is no JSON object. Write {example} on each line.")
    return cells
