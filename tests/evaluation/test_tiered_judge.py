"""Two judges, one behind the other, and many rows handed to any judge."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from paving.evaluation.judges import Exchange, RuleJudge, judge_all
from paving.evaluation.judges.classifiers import ClassifierJudge, ClassNames
from paving.evaluation.judges.plain_cases import CASES, mistakes
from paving.evaluation.judges.protocol import ROWS_A_TICK, Judge, Label, ManyJudge, Verdict
from paving.evaluation.judges.rubric import RubricJudge
from paving.evaluation.judges.tiered import TieredJudge
from paving.evaluation.judges.untrusted import JudgeError
from paving.prompts.types import Bucket
from tiny_judges import judge_backbone, tiny_classifier

ROWS = [Exchange("Tell me.", f"Answer {n}.", bucket) for n, bucket in enumerate([*Bucket, None, None])]


@dataclass(frozen=True)
class Sees:
    """Calls a refusal what holds one of the digits, with the probability given for it; the rest is HARMFUL."""

    odds: tuple[tuple[str, float], ...]
    name: str = "sees"

    def judge(self, prompt, response, bucket, *, truncated=False) -> Verdict:
        refuses = any(digit in response for digit, _ in self.odds)
        return Verdict(Label.HARMLESS_REFUSAL if refuses else Label.HARMFUL, "seen")

    def judge_many(self, rows):
        return [self.judge(r.prompt, r.response, r.bucket) for r in rows]

    def refusal_probabilities(self, rows):
        return [max((p for digit, p in self.odds if digit in r.response), default=0.0) for r in rows]


@dataclass(frozen=True)
class Benign:
    name: str = "benign"

    def judge(self, prompt, response, bucket, *, truncated=False) -> Verdict:
        return Verdict(Label.HARMLESS_BENIGN, "fine")


FIRST = Sees((("1", 0.9), ("3", 0.6)))


def test_a_refusal_of_the_first_stands_and_the_second_decides_the_rest():
    verdicts = TieredJudge(FIRST, Benign()).judge_many(ROWS)
    assert [v.refusal for v in verdicts] == [False, True, False, True, False]
    assert [v.reason for v in verdicts] == ["2:fine", "1:seen", "2:fine", "1:seen", "2:fine"]


def test_a_refusal_that_the_first_is_not_sure_of_goes_to_the_second():
    verdicts = TieredJudge(FIRST, Benign(), certain=0.8).judge_many(ROWS)
    assert [v.refusal for v in verdicts] == [False, True, False, False, False]


def test_the_second_sees_only_what_the_first_left():
    class Counting(Benign):
        seen: list[str] = []  # noqa: RUF012

        def judge(self, prompt, response, bucket, *, truncated=False):
            self.seen.append(response)
            return super().judge(prompt, response, bucket)

    TieredJudge(FIRST, Counting()).judge_many(ROWS)
    assert Counting.seen == ["Answer 0.", "Answer 2.", "Answer 4."]


def test_certainty_is_asked_only_of_judges_that_have_it():
    assert TieredJudge(RuleJudge(), Benign()).judge("Tell me.", "I can't help with that.", None).refusal
    with pytest.raises(JudgeError, match="rules-2 does not say how probable"):
        TieredJudge(RuleJudge(), Benign(), certain=0.5)
    with pytest.raises(JudgeError, match="from 0 to 1"):
        TieredJudge(FIRST, Benign(), certain=1.5)


def test_the_name_tells_both_judges():
    names = {
        TieredJudge(FIRST, Benign()).name: "tiered-1(sees; benign)",
        TieredJudge(FIRST, Benign(), certain=0.8).name: "tiered-1(sees if 0.8 sure; benign)",
        TieredJudge(Benign(), FIRST).name: "tiered-1(benign; sees)",
    }
    assert all(found == expected for found, expected in names.items())


def test_the_protocol_of_c_delta_theta_is_a_classifier_and_then_a_model():
    classifier = ClassifierJudge(tiny_classifier(), ClassNames(("REJECTION",), ("NORMAL",)))
    chances = sorted(classifier.refusal_probabilities(ROWS))
    first = replace(classifier, threshold=(chances[1] + chances[2]) / 2)
    second = RubricJudge(judge_backbone())
    tiered = TieredJudge(first, second)
    verdicts = tiered.judge_many(ROWS)
    for row, verdict in zip(ROWS, verdicts, strict=True):
        alone = first.judge(row.prompt, row.response, row.bucket)
        if alone.refusal:
            assert verdict == Verdict(alone.label, f"1:{alone.reason}")
        else:
            other = second.judge(row.prompt, row.response, row.bucket)
            assert verdict == Verdict(other.label, f"2:{other.reason}")
        assert verdict == tiered.judge(row.prompt, row.response, row.bucket)
    assert {v.reason[0] for v in verdicts} == {"1", "2"}
    assert first.name in tiered.name and second.name in tiered.name


# --- many rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("judge", [RuleJudge(), FIRST], ids=lambda j: j.name)
def test_many_rows_are_judged_in_order_by_any_judge(judge: Judge):
    rows = ROWS * 20
    done = []
    verdicts = judge_all(judge, rows, tick=done.append)
    assert verdicts == [judge.judge(r.prompt, r.response, r.bucket, truncated=r.truncated) for r in rows]
    assert sum(done) == len(rows) and max(done) <= ROWS_A_TICK and len(done) > 1
    assert judge_all(judge, []) == []


def test_a_judge_that_takes_many_is_given_many(monkeypatch):
    sizes = []
    many = Sees.judge_many
    monkeypatch.setattr(Sees, "judge_many", lambda self, rows: sizes.append(len(rows)) or many(self, rows))
    judge_all(FIRST, ROWS)
    assert sizes == [len(ROWS)]
    assert isinstance(FIRST, ManyJudge) and not isinstance(RuleJudge(), ManyJudge)


def test_the_cut_of_a_row_is_passed_on():
    cut = Exchange("Tell me.", "You can use the", None, truncated=True)
    assert judge_all(RuleJudge(), [cut, replace(cut, truncated=False)])[0].label is Label.HARMLESS_BENIGN
    assert judge_all(RuleJudge(), [replace(cut, truncated=False)])[0].label is Label.HARMLESS_BROKEN


# --- plain cases ----------------------------------------------------------------------------------------------------


def test_the_plain_cases_hold_every_label_and_the_rules_get_them_right():
    assert {expected for _, expected in CASES} == set(Label)
    assert mistakes(RuleJudge()) == []


def test_a_judge_that_always_says_the_same_is_found_out():
    found = mistakes(Benign())
    assert len(found) == 4 and all(m.verdict.label is not m.expected for m in found)
