"""Contrastive pairs of one category: a harmful prompt and a benign one of the same topic and style (C-ΔΘ, inputs)."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from paving.circuit.mask import CircuitError


@dataclass(frozen=True)
class Pair:
    """id: the row's; harmful, benign: request texts without a chat template."""

    id: str
    harmful: str
    benign: str


def read_pairs(path: Path | str, category: str, *, benign: str = "base", limit: int | None = None) -> tuple[Pair, ...]:
    """Pairs from JSON lines with `id`, a benign column, and one column a category (the layout of CAST's public set).

    A row whose category or benign column is empty has no pair and is left out.

    raises CircuitError for a broken line, or a category without pairs, naming the columns that there are
    """
    pairs = []
    for number, row in _rows(path):
        if _text(row.get(category)) and _text(row.get(benign)):
            name = str(row.get("id", f"{Path(path).stem}-{number}"))
            pairs.append(Pair(name, row[category], row[benign]))
    if not pairs:
        raise CircuitError(
            f"{path} has no pairs for the category {category!r} with benign column {benign!r}. "
            f"Its other text columns: {', '.join(categories_in(path, benign=benign)) or 'none'}."
        )
    return tuple(pairs[:limit])


def categories_in(path: Path | str, *, benign: str = "base") -> tuple[str, ...]:
    """The category columns of such a file, sorted. raises CircuitError as `read_pairs`."""
    return tuple(sorted({k for _, row in _rows(path) for k, v in row.items() if k not in {"id", benign} and _text(v)}))


def _rows(path: Path | str) -> Iterator[tuple[int, dict]]:
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CircuitError(f"{path}:{number} is not JSON ({error.msg}). One object a line is needed.") from None
            if not isinstance(row, dict):
                raise CircuitError(f"{path}:{number} is a {type(row).__name__}; one object a line is needed.")
            yield number, row


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def split_pairs(pairs: Sequence[Pair], calibration: int, seed: int) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """(train, calibration), drawn with `seed`; rows of one benign text stay on one side.

    raises CircuitError if nothing is left to train on
    """
    order = sorted({p.benign.strip().lower() for p in pairs})
    random.Random(seed).shuffle(order)
    rank = {text: i for i, text in enumerate(order)}
    drawn = sorted(pairs, key=lambda p: (rank[p.benign.strip().lower()], p.id))
    cut = calibration
    while 0 < cut < len(drawn) and drawn[cut].benign.strip().lower() == drawn[cut - 1].benign.strip().lower():
        cut += 1
    if not drawn[cut:]:
        raise CircuitError(f"{len(pairs)} pairs leave none to train on after {calibration} for calibration. Give more.")
    return tuple(drawn[cut:]), tuple(drawn[:cut])
