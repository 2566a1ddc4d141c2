"""Pairs of a category: what is read, what is refused, how they are split."""

from __future__ import annotations

import json

import pytest

from paving.circuit.mask import CircuitError
from paving.circuit.pairs import Pair, categories_in, read_pairs, split_pairs
from tiny_pairs import tiny_pairs, write_pairs


def test_a_row_without_its_category_has_no_pair(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"id": "a", "base": "one", "harm": "two"},
        {"id": "b", "base": "three", "harm": " "},
        {"base": "four", "harm": "five"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    assert read_pairs(path, "harm") == (Pair("a", "two", "one"), Pair("pairs-3", "five", "four"))
    assert read_pairs(path, "harm", limit=1) == (Pair("a", "two", "one"),)
    assert categories_in(path) == ("harm",)


def test_a_category_without_pairs_names_the_categories_that_there_are(tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", tiny_pairs(3))
    with pytest.raises(CircuitError, match=r"no pairs for the category 'crime'.*Its other text columns: harm"):
        read_pairs(path, "crime")
    with pytest.raises(CircuitError, match="benign column 'safe'"):
        read_pairs(path, "harm", benign="safe")


@pytest.mark.parametrize("line", ["{broken", "[1, 2]"])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"base": "a", "harm": "b"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(CircuitError, match=r"pairs.jsonl:2 is"):
        read_pairs(path, "harm")


def test_the_split_is_drawn_by_its_seed_and_parts_no_benign_text():
    pairs = [*tiny_pairs(12), *(Pair(f"again{i}", f"w{i}", "The same benign text") for i in range(4))]
    train, calibration = split_pairs(pairs, 5, seed=1)
    assert sorted(p.id for p in (*train, *calibration)) == sorted(p.id for p in pairs)
    assert not {p.benign for p in train} & {p.benign for p in calibration}
    assert (train, calibration) == split_pairs(list(reversed(pairs)), 5, seed=1)
    assert split_pairs(pairs, 5, seed=1) != split_pairs(pairs, 5, seed=2)


def test_the_split_parts_no_harmful_text_either_however_texts_are_joined():
    joined = [Pair("x", "A request", "b1"), Pair("y", "a request ", "b2"), Pair("z", "another", "B2")]
    for seed in range(20):
        train, calibration = split_pairs([*tiny_pairs(6), *joined], 3, seed=seed)
        assert len({p in train for p in joined}) == 1
        assert len(train) + len(calibration) == 9


@pytest.mark.parametrize("ids", [("a", "a"), ("pairs-2", None), (1, "1")])
def test_an_id_stands_for_one_pair(tmp_path, ids):
    path = tmp_path / "pairs.jsonl"
    rows = [{"id": i, "base": f"b{n}", "harm": f"h{n}"} for n, i in enumerate(ids)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(CircuitError, match=r"pairs.jsonl:2 has the id '.*' of an earlier pair"):
        read_pairs(path, "harm")


@pytest.mark.parametrize("column", ["id", "base"])
def test_neither_ids_nor_benign_texts_are_a_category(tmp_path, column):
    with pytest.raises(CircuitError, match="no pairs for the category"):
        read_pairs(write_pairs(tmp_path / "pairs.jsonl", tiny_pairs(3)), column)


def test_calibration_may_not_take_everything():
    with pytest.raises(CircuitError, match="leave none to train on"):
        split_pairs(tiny_pairs(4), 4, seed=0)
