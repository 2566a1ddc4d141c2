"""Contrastive pairs of words for tiny models: the harmful side begins with words that the benign side never has."""

from __future__ import annotations

import json
import random
from pathlib import Path

from paving.circuit.pairs import Pair
from paving.training.openings import Openings

REFUSING = tuple(f"w{170 + i} w{171 + i} w{172 + i}" for i in range(0, 12))
COMPLYING = tuple(f"w{140 + i} w{141 + i}" for i in range(0, 12))
OPENINGS = Openings(REFUSING, COMPLYING)


def tiny_pairs(n: int = 8, seed: int = 0) -> list[Pair]:
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{rng.randrange(low, high)}" for _ in range(rng.randrange(2, 8)))

    return [Pair(f"pair{i}", words(100, 130), words(0, 60)) for i in range(n)]


def write_pairs(path: Path, pairs: list[Pair], category: str = "harm") -> Path:
    rows = [{"id": p.id, "base": p.benign, category: p.harmful} for p in pairs]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path
