"""The composition benchmark on two tiny runs: its rows, what it leaves out, and that nothing is measured twice."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest

from paving.circuit_run import edit, find
from paving.run import Means
from tiny_circuit_runs import WordJudge, tiny_circuit, write_circuit_files
from tiny_pairs import tiny_pairs


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """Two runs on one base, categories `harm` and `other`, and held-out prompts of which one run has seen one."""
    folder = write_circuit_files(tmp_path_factory.mktemp("composition"))
    means = Means(folder / "cache")
    pairs = [{"id": p.id, "base": p.benign, "harm": p.harmful, "other": f"w5 w9 {p.harmful}"} for p in tiny_pairs(14)]
    held = [
        {"id": f"t{p.id}", "base": p.benign, "harm": p.harmful, "other": f"w7 w3 {p.harmful}"} for p in tiny_pairs(6, seed=9)
    ]
    held[2]["other"] = pairs[0]["other"]
    for name, rows in (("train", pairs), ("test", held)):
        (folder / f"cast_categories_{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    for seed, category in enumerate(("harm", "other")):
        changes = {"category": category, "pairs": str(folder / "cast_categories_train.jsonl"), "seed": seed}
        run = folder / "runs" / f"{category}-seed0-selective"
        find(tiny_circuit(folder, **changes), run, means)
        edit(run, means, judge=WordJudge())
    args = {"data": folder, "runs": folder / "runs", "out": folder / "out", "categories": ["harm", "other"], "seed": 0}
    return Namespace(**args, pairs=3, scales=[0.5, 1.0])


def test_all_rules_at_all_scales_beside_each_alone_and_nothing_twice(script, composed, tmp_path, monkeypatch):
    bench, path = script("circuit_composition"), tmp_path / "seed0.json"
    first = bench.measured(composed, None, path)
    names = [row.name for row in first.rows]
    assert names[:3] == ["base", "harm alone", "other alone"] and len(names) == 3 + 3 * 2
    assert "all, largest, at 0.5" in names and {row.sets["benign"].against_base is None for row in first.rows[1:]} == {False}
    assert sum(first.shared.values()) > 0 and path.exists()
    monkeypatch.setattr(bench, "unseen_by_all", lambda *_: pytest.fail("measured again"))
    kept = bench.Kept.model_validate_json(path.read_text(encoding="utf-8"))
    assert bench.measured(composed, kept, path) == first
    text = bench.markdown(first)
    assert "| all, mean, at 1 | " in text and "Channels by how many circuits hold them: 1 circuit: " in text
    with pytest.raises(SystemExit, match="other deltas or prompts"):
        bench.measured(Namespace(**vars(composed) | {"pairs": 2}), kept, path)


def test_what_one_of_the_runs_has_seen_is_asked_of_none(script, composed):
    folders = {c: composed.runs / f"{c}-seed0-selective" for c in composed.categories}
    asked = {s.name: [p.id for p in s.prompts] for s in script("circuit_composition").unseen_by_all(composed, folders)}
    assert (
        "tpair2/harmful" in asked["harm"] and "tpair2/harmful" not in asked["other"] and "tpair1/harmful" in asked["other"]
    )
