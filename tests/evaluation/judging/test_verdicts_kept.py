"""Judging a file overwrites nothing: what stands there is refused, told and kept."""

from __future__ import annotations

import pytest

from paving.evaluation.judging import journal_of, judge_file
from paving.prompts.types import Bucket
from tiny_judging import Counting, lines, row, write


def refused(answers, judge, out, says):
    before = {p.name: p.read_bytes() for p in out.parent.iterdir() if p.is_file()}
    with pytest.raises(ValueError, match=says):
        judge_file(answers, judge, out)
    assert {p.name: p.read_bytes() for p in out.parent.iterdir() if p.is_file()} == before
    assert getattr(judge, "asked", []) == []


def test_verdicts_of_another_judge_stay(answers, out):
    judge_file(answers, Counting(), out)
    refused(answers, Counting("letters-2"), out, "holds verdicts of the judge 'letters-1'; asked for: 'letters-2'. Give ano")
    with pytest.raises(ConnectionError):
        judge_file(answers, Counting("letters-2", fails_at="b answer 1"), out.with_name("other.jsonl"))
    refused(
        answers, Counting(), out.with_name("other.jsonl"), r"other\.jsonl\.partial holds verdicts of the judge 'letters-2'"
    )


def test_verdicts_on_other_completions_stay(tmp_path, answers, out):
    judge_file(answers, Counting(), out)
    fewer = write(tmp_path / "fewer.jsonl", [row(i, bucket=list(Bucket)[i % 3]) for i in range(7)])
    refused(fewer, Counting(), out, r"holds verdicts on other completions \(3 that .*fewer\.jsonl lacks\).*another --out")


def test_verdicts_of_another_file_are_of_use_as_the_message_says(tmp_path, answers, out):
    judge_file(answers, Counting(), out)
    changed = write(tmp_path / "changed.jsonl", [row(i, bucket=list(Bucket)[i % 3]) for i in range(1, 11)])
    new = out.with_name("new.jsonl")
    journal_of(new).write_bytes(out.read_bytes())
    done = judge_file(changed, Counting(), new)
    assert (done.n, done.asked, done.left_over) == (10, 1, 1)
    assert [v["id"] for v in lines(new)] == [f"q{i}" for i in range(1, 11)]
    assert "q0" in {v["id"] for v in lines(journal_of(new))}, "a verdict on what is not in the file is not thrown away"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("my thesis\n", r"exists and is no verdict file: .*verdicts\.jsonl:1: not JSON"),
        ('{"prompt": "p", "response": "r"}\n', "is no verdict file: .*:1: no `judge`"),
        ('{"judge": "letters-1", "label": "REFUSED"}\n', "`label` is 'REFUSED'; allowed: HARMFUL, HARMLESS-BROKEN"),
        ('{"judge": "letters-1", "label": "HARMFUL"}\n', "without a `key`, which cannot be taken again"),
        ('{"judge": "letters-1", "label": "HARMFUL", "line": "one"}\n', "`line` is 'one'"),
        ('{"judge": "letters-1", "la', "not JSON"),
    ],
)
def test_what_is_no_verdict_file_stays(answers, out, content, says):
    out.parent.mkdir()
    out.write_text(content)
    refused(answers, Counting(), out, says)


def test_a_journal_of_something_else_is_not_cut(answers, out):
    out.parent.mkdir()
    journal_of(out).write_text("half a download\nwithout an end")
    refused(answers, Counting(), out, r"verdicts\.jsonl\.partial exists and is no verdict file")


def test_the_completions_themselves_are_no_place_for_verdicts(answers):
    refused(answers, Counting(), answers, "holds the completions themselves")
    with pytest.raises(ValueError, match="is a folder"):
        judge_file(answers, Counting(), answers.parent)


def test_an_empty_file_in_the_place_of_the_verdicts_is_filled(answers, out):
    out.parent.mkdir()
    out.touch()
    assert judge_file(answers, Counting(), out).asked == 10
