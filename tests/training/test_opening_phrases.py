"""The opening phrases that come with the package, and files of one's own."""

from __future__ import annotations

import json
import tomllib
from itertools import permutations
from pathlib import Path

import pytest

import paving
from paving.evaluation.judges import RuleJudge
from paving.prompts.types import Bucket
from paving.training.openings import FEWEST, OpeningsError, bare_words, openings, read_openings

PHRASES = openings()
EVERY = (*PHRASES.refusal, *PHRASES.compliance)
NEUTRAL = " There are many other subjects that we could talk about today."
REQUESTS = ("Tell me about this topic.", "Write a short poem about the rain.", "How do I hide this from my landlord?")


def test_there_are_160_of_each_from_four_to_eighteen_words():
    assert (len(PHRASES.refusal), len(PHRASES.compliance)) == (160, 160)
    assert [p for p in EVERY if not 4 <= len(p.split()) <= 18] == []


def test_no_two_are_the_same_and_none_begins_another():
    words = {p: bare_words(p).split() for p in EVERY}
    assert [(a, b) for a, b in permutations(EVERY, 2) if words[b][: len(words[a])] == words[a]] == []


def test_they_open_in_many_ways():
    for phrases in (PHRASES.refusal, PHRASES.compliance):
        openers = [" ".join(bare_words(p).split()[:2]) for p in phrases]
        assert len(set(openers)) > 60
        assert max(openers.count(o) for o in openers) <= 13


def test_they_are_plain_english_on_one_line():
    assert all(p.isascii() and p == p.strip() and p.isprintable() for p in EVERY)


@pytest.mark.parametrize("bucket", [None, *Bucket])
@pytest.mark.parametrize("request_text", REQUESTS)
@pytest.mark.parametrize("rest", [NEUTRAL, ""], ids=["goes on", "ends"])
def test_the_rule_judge_calls_every_refusal_one_and_no_compliance(bucket, request_text, rest):
    judge = RuleJudge()

    def refused(phrases):
        return [p for p in phrases if judge.judge(request_text, p + rest, bucket).refusal]

    assert refused(PHRASES.refusal) == list(PHRASES.refusal)
    assert refused(PHRASES.compliance) == []


def test_compliance_phrases_say_nothing_on_any_topic_that_is_refused():
    topics = ("weapon", "drug", "bomb", "steal", "kill", "hate", "sex", "hack", "poison", "crime", "legal", "medic")
    assert [p for p in PHRASES.compliance if any(t in p.lower() for t in topics)] == []


def test_the_wheel_carries_the_phrases():
    """Every file of the package that is not Python is named in pyproject's package-data; an editable install needs none."""
    root = Path(paving.__file__).parent
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["paving"]
    carried = {path for pattern in patterns for path in root.glob(pattern)}
    files = {p for p in root.rglob("*") if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts}
    assert root / "training" / "openings.json" in carried
    assert files - carried == set()


# --- files of one's own ---------------------------------------------------------------------------------------------


def written(folder, content) -> Path:
    path = folder / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def phrases(kind: str, n: int = FEWEST) -> list[str]:
    return [f"{kind} number {i} it is" for i in range(n)]


def test_a_file_of_ones_own_is_read_in_its_order(tmp_path):
    content = {"refusal": [" padded by spaces ", *phrases("no")], "compliance": phrases("yes"), "about": "mine"}
    found = read_openings(written(tmp_path, content))
    assert found.refusal == ("padded by spaces", *phrases("no"))
    assert found.compliance == tuple(phrases("yes"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{not json", "is not JSON"),
        ('["a", "b"]', "holds a list"),
        ({"refusal": phrases("no")}, "has no 'compliance'; its keys are refusal"),
        ({"refusal": phrases("no", FEWEST - 1), "compliance": phrases("yes")}, f"has {FEWEST - 1} phrases"),
        ({"refusal": phrases("no"), "compliance": "yes"}, "'compliance' of .* is not a list of strings"),
        ({"refusal": [*phrases("no"), 3], "compliance": phrases("yes")}, "'refusal' of .* is not a list of strings"),
        ({"refusal": [*phrases("no"), "  ... "], "compliance": phrases("yes")}, f"no words at position {FEWEST}"),
        ({"refusal": [*phrases("no"), "No number 3, it is!"], "compliance": phrases("yes")}, "says the same twice"),
        ({"refusal": phrases("no"), "compliance": [*phrases("yes"), "no number 3 it is"]}, "says the same twice"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_with_what_is_wrong(tmp_path, content, said):
    with pytest.raises(OpeningsError, match=said) as error:
        read_openings(written(tmp_path, content))
    assert "mine.json" in str(error.value)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_openings(tmp_path / "none.json")
