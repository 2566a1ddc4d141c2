"""The tables of the Residual Paving paper (arXiv 2605.20262), every cell as printed.

They stand in `paper/table_N.json`: one file a table, one list a row, with the protocol behind them. Nothing there was
computed; what can be checked (intervals from counts, differences, gains) is checked by the tests.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Self

from pydantic import model_validator

from paving.evaluation.results import Record
from paving.prompts.types import Bucket

# Names as the tables print them, and the exact model ids they stand for (table 5, table 6).
BACKBONES = {
    "Gemma-3-4B-IT": "google/gemma-3-4b-it",
    "Gemma-2-2B-IT": "google/gemma-2-2b-it",
    "Llama-3.2-1B-Instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "Qwen2.5-1.5B-Instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen2.5-7B-Instruct": "Qwen/Qwen2.5-7B-Instruct",
    "Qwen2.5-14B-Instruct": "Qwen/Qwen2.5-14B-Instruct",
}
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:e-?\d+)?")
_INTERVAL = re.compile(rf"\[({_NUMBER.pattern}), ({_NUMBER.pattern})\]")


class Column(Record):
    """A heading as printed, and the unit of what stands below it ("" for names and plain numbers)."""

    heading: str
    unit: str


class PaperProtocol(Record):
    """How the figures of a table came about, as far as the paper says; None where it does not.

    judges       the judges of its rows, none where the paper does not say
    train, held_out  prompts of edit / benign keep / harmful keep
    seeds        how many splits the table shows
    scales       the scales of its rows, where they are not those of table 6
    same_source  edit prompts and keeps come from one benchmark
    """

    judges: tuple[str, ...]
    train: tuple[int, int, int] | None
    held_out: tuple[int, int, int] | None
    max_new_tokens: int | None
    seeds: int
    scales: tuple[float, ...] = ()
    same_source: bool = False
    note: str


class PaperBlock(Record):
    """One part of a table. The first `labels` columns name a row; an empty cell is one that the paper leaves empty."""

    title: str
    labels: int
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]

    @model_validator(mode="before")
    @classmethod
    def _columns_by_name(cls, raw: dict) -> dict:
        pairs = [c if isinstance(c, dict | Column) else {"heading": c[0], "unit": c[1]} for c in raw["columns"]]
        return {**raw, "columns": pairs}

    @model_validator(mode="after")
    def _every_row_is_whole(self) -> Self:
        short = [row[: self.labels] for row in self.rows if len(row) != len(self.columns)]
        if short:
            raise ValueError(f"rows {short} do not have the {len(self.columns)} cells of the head")
        return self

    @property
    def values(self) -> tuple[Column, ...]:
        """The columns that hold figures."""
        return self.columns[self.labels :]

    def named(self, *name: str) -> list[tuple[str, ...]]:
        """Rows that begin with these cells. raises KeyError where there is none."""
        found = [row for row in self.rows if row[: len(name)] == name]
        if not found:
            raise KeyError(name)
        return found

    def cell(self, heading: str, *name: str) -> str:
        """One cell as printed, of the first row that begins with these cells."""
        return self.named(*name)[0][[c.heading for c in self.columns].index(heading)]


class PaperTable(Record):
    """backbone: the model id that all rows are of; None where rows name their own."""

    table: str
    title: str
    backbone: str | None
    protocol: PaperProtocol
    blocks: tuple[PaperBlock, ...]


@cache
def published(table: str) -> PaperTable:
    """Table "1", "2", ... as printed. raises FileNotFoundError for one that is not kept here."""
    source = files("paving.reproduce") / "paper" / f"table_{table}.json"
    return PaperTable.model_validate_json(source.read_text(encoding="utf-8"))


def number(printed: str) -> float | None:
    """The first number of a cell: "88.6 [85.5, 91.1]" -> 88.6; None for an empty cell or words."""
    found = _NUMBER.search(printed)
    return float(found[0]) if found else None


def interval(printed: str) -> tuple[float, float] | None:
    """The bracketed interval of a cell: "88.6 [85.5, 91.1]" -> (85.5, 91.1)."""
    found = _INTERVAL.search(printed)
    return (float(found[1]), float(found[2])) if found else None


def paper_name(model: str) -> str | None:
    """The paper's name for exactly this model, given as a model id or as a folder of a Hugging Face cache; else None.

    A folder of any other name is not taken for a backbone of the paper, whatever it is called.
    """
    parts = model.replace("\\", "/").split("/")
    for name, model_id in BACKBONES.items():
        if model.lower() == model_id.lower() or f"models--{model_id.replace('/', '--')}" in parts:
            return name
    return None


def by_bucket(counts: tuple[int, int, int]) -> dict[Bucket, int]:
    return dict(zip(Bucket, counts, strict=True))
