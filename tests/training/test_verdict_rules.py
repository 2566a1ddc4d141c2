"""What training makes of a judge's labels: the base-refusal filter, and targets that may be trained towards."""

from __future__ import annotations

import pytest

from paving.evaluation.judges import Label, Verdict
from paving.generation import Completion
from paving.run_labels import labels_of
from paving.training.verdicts import BROKEN, HARMFUL, REFUSAL, base_refused, usable_target


def answers(*texts: str) -> list[Completion]:
    return [Completion(str(i), "edit", "", text, 1, False, 0.0) for i, text in enumerate(texts)]


class Word:
    """A judge of many rows at once that notes how many it was handed."""

    name = "word"

    def __init__(self):
        self.handed = []

    def judge(self, prompt, response, bucket, *, truncated=False):
        pytest.fail("asked for one row")

    def judge_many(self, rows):
        self.handed.append(len(rows))
        return [Verdict(Label.HARMLESS_REFUSAL if r.response == "no" else Label.HARMLESS_BENIGN, "word") for r in rows]


def test_the_base_refusal_filter_keeps_what_the_judge_calls_a_refusal():
    judge = Word()
    assert base_refused(answers("no", "yes", "no"), labels_of(judge)) == {"0", "2"}
    assert judge.handed == [3], "together: an endpoint that answers nothing is noticed over many rows only"


def test_what_was_asked_is_kept_and_a_torn_line_is_asked_for_again(tmp_path):
    kept, judge = tmp_path / "run" / "labels.jsonl", Word()
    first = labels_of(judge, kept)(answers("no", "yes", "no", "maybe"))
    assert judge.handed == [3], "the same words to the same prompt are asked for once"
    assert labels_of(judge, kept)(answers("yes", "no")) == [first[1], first[0]] and judge.handed == [3]
    kept.write_text(kept.read_text(encoding="utf-8")[:-20], encoding="utf-8")  # as a kill may leave it
    assert labels_of(judge, kept)(answers("no", "yes", "no", "maybe")) == first and judge.handed == [3, 1]
    assert labels_of(judge, kept)(answers("no", "yes", "no", "maybe")) == first and judge.handed == [3, 1]
    other = Word()
    other.name = "another"
    assert labels_of(other, kept)(answers("no")) == first[:1] and other.handed == [1]


def test_the_names_are_the_judges_own():
    assert {REFUSAL, BROKEN, HARMFUL} < {label.value for label in Label}


@pytest.mark.parametrize(
    ("label", "kind", "usable"),
    [
        (Label.HARMLESS_REFRAME, "reframe", True),
        (Label.HARMLESS_REFUSAL, "own", False),
        (Label.HARMLESS_BROKEN, "own", False),
        (Label.HARMFUL, "reframe", False),
        (Label.HARMFUL, "own", True),  # the owner calls the prompt safe; only generated targets are judged for harm
    ],
)
def test_what_an_edit_prompt_may_be_trained_towards(label, kind, usable):
    assert usable_target(label.value, kind) is usable
