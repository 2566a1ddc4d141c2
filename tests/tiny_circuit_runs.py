"""Circuit runs small enough for tests: a tiny base, pairs of words, and a judge of first words."""

from __future__ import annotations

import json
from pathlib import Path

from paving.circuit.arithmetic import ArithmeticConfig
from paving.circuit_run import CircuitConfig, StrengthConfig, edit, find
from paving.evaluation.judges import Label, Verdict
from paving.generation import Decoding
from tiny_models import tiny_backbone
from tiny_pairs import COMPLYING, REFUSING, tiny_pairs, write_pairs


class WordJudge:
    """A refusal is an answer that begins with one of the refusing words."""

    name = "words-1"

    def judge(self, prompt, response, bucket=None, *, truncated=False):
        first = next(iter(response.split()), "")
        refused = first[:1] == "w" and first[1:].isdigit() and int(first[1:]) >= 170
        return Verdict(Label.HARMLESS_REFUSAL if refused else Label.HARMLESS_BENIGN, "")


def write_circuit_files(folder: Path) -> Path:
    """Base, pairs, held-out pairs and openings of a tiny circuit run, in `folder`."""
    write_pairs(folder / "train.jsonl", tiny_pairs(14))
    rows = [{"id": p.id, "base": p.benign, "harm": p.harmful, "other": f"w5 {p.harmful}"} for p in tiny_pairs(4, seed=9)]
    (folder / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    (folder / "openings.json").write_text(json.dumps({"refusal": REFUSING, "compliance": COMPLYING}), encoding="utf-8")
    backbone = tiny_backbone()
    backbone.model.save_pretrained(folder / "base")
    backbone.tokenizer.save_pretrained(folder / "base")
    return folder


def tiny_circuit(files: Path, **changes) -> CircuitConfig:
    return CircuitConfig(
        **{
            "model": str(files / "base"),
            "pairs": str(files / "train.jsonl"),
            "category": "harm",
            "held_out": str(files / "test.jsonl"),
            "calibration": 4,
            "openings": str(files / "openings.json"),
            "arithmetic": ArithmeticConfig(epochs=2, learning_rate=1e-2, retain="kl"),
            "own_tokens": 4,
            "strength": StrengthConfig(alphas=(0.5, 1.0), limit=1.0, max_new_tokens=3),
            "decoding": Decoding(max_new_tokens=4),
            **changes,
        }
    )


def run_whole(files, folder, means, **changes):
    find(tiny_circuit(files, **changes), folder, means)
    return edit(folder, means, judge=WordJudge())
