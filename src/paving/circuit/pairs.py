"""Contrastive pairs of one category: a harmful prompt and a benign one of the same topic and style (C-ΔΘ, inputs)."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
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

    raises CircuitError for a broken line, an id that is there twice, or a category without pairs, naming the columns
    that there are
    """
    pairs: dict[str, Pair] = {}
    for number, row in _rows(path):
        if category not in {"id", benign} and _text(row.get(category)) and _text(row.get(benign)):
            name = f"{Path(path).stem}-{number}" if row.get("id") is None else str(row["id"])
            if name in pairs:  # answers are kept by id: one would stand for both
                raise CircuitError(
                    f"{path}:{number} has the id {name!r} of an earlier pair. Give each row an id of its own."
                )
            pairs[name] = Pair(name, row[category], row[benign])
    if not pairs:
        raise CircuitError(
            f"{path} has no pairs for the category {category!r} with benign column {benign!r}. "
            f"Its other text columns: {', '.join(categories_in(path, benign=benign)) or 'none'}."
        )
    return tuple(pairs.values())[:limit]


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
    """(train, calibration), drawn with `seed`; rows that share a benign or a harmful text stay on one side.

    raises CircuitError if nothing is left to train on
    """
    order = sorted({p.benign.strip().lower() for p in pairs})
    random.Random(seed).shuffle(order)
    place = _places(pairs, {text: i for i, text in enumerate(order)})
    drawn = sorted(pairs, key=lambda p: (place[p], p.id))
    cut = calibration
    while 0 < cut < len(drawn) and place[drawn[cut]] == place[drawn[cut - 1]]:
        cut += 1
    if not drawn[cut:]:
        raise CircuitError(f"{len(pairs)} pairs leave none to train on after {calibration} for calibration. Give more.")
    return tuple(drawn[cut:]), tuple(drawn[:cut])


def _places(pairs: Sequence[Pair], rank: Mapping[str, int]) -> dict[Pair, int]:
    """The rank of a pair's benign text, or the lowest among all pairs that a shared text joins to it, however indirectly."""
    place = {p: rank[p.benign.strip().lower()] for p in pairs}
    joined = True
    while joined:
        joined = False
        for side in ("benign", "harmful"):
            lowest: dict[str, int] = {}
            for p in pairs:
                text = getattr(p, side).strip().lower()
                lowest[text] = min(place[p], lowest.get(text, place[p]))
            for p in pairs:
                found = lowest[getattr(p, side).strip().lower()]
                joined |= found < place[p]
                place[p] = found
    return place
