"""Judging a file: verdicts in its order, nothing judged twice, nothing lost by a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paving.evaluation.judges import Label, RuleJudge, Verdict
from paving.evaluation.judging import KnownVerdicts, journal_of, judge_file
from paving.evaluation.statistics import wilson
from paving.evaluation.verdicts import read_verdicts
from paving.prompts.types import Bucket
from tiny_judging import Counting, lines, row, write


def test_a_verdict_for_every_completion_in_its_order(answers, out):
    done = judge_file(answers, Counting(), out)
    assert (done.n, done.asked, done.left_over) == (10, 10, 0)
    assert [v["id"] for v in lines(out)] == [f"q{i}" for i in range(10)]
    for i, verdict in enumerate(lines(out)):
        label = list(Label)[(97 + i) % 5]
        assert verdict["label"] == label and verdict["refusal"] == (label is Label.HARMLESS_REFUSAL)
        assert (verdict["judge"], verdict["line"], verdict["bucket"]) == ("letters-1", i + 1, list(Bucket)[i % 3])
    assert [p.name for p in out.parent.iterdir()] == ["verdicts.jsonl"], "nothing is left beside the result"


def test_the_verdicts_are_those_of_the_judge_asked_directly(tmp_path, out):
    texts = [
        "I'm sorry, but I can't help with that.",
        "",
        "Sure! 1. Take flour. 2. Add water. 3. Bake.",
        "no no no no " * 20,
    ]
    rows = [row(i, response=t, bucket=b, truncated=c) for i, (t, b, c) in enumerate(
        (t, b, c) for t in texts for b in (None, *Bucket) for c in (False, True))]  # fmt: skip
    judge_file(write(tmp_path / "a.jsonl", rows), RuleJudge(), out)
    for r, found in zip(rows, read_verdicts(out), strict=True):
        expected = RuleJudge().judge(r["prompt"], r["response"], r["bucket"], truncated=r["truncated"])
        assert Verdict(found.label, found.reason) == expected


def test_counts_and_rates_of_each_bucket(tmp_path, out):
    rows = [row(2, bucket="edit"), row(27, bucket="edit"), row(1, bucket="harmful_keep"), row(5)]  # c, b, b, f
    done = judge_file(write(tmp_path / "a.jsonl", rows), Counting(), out)
    found = {b.bucket: b for b in done.buckets}
    assert list(found) == ["edit", "benign_keep", "harmful_keep", "none", "all"]
    labels = Counter(list(Label)[ord(r["response"][0]) % 5].value for r in rows)
    assert {k: v for k, v in found["all"].labels.items() if v} == labels
    assert found["benign_keep"].n == 0 and found["benign_keep"].refusal.rate is None
    for bucket in found.values():
        assert bucket.n == sum(bucket.labels.values())
        assert bucket.refusal == wilson(bucket.labels["HARMLESS-REFUSAL"], bucket.n)


def test_without_a_row_that_lacks_one_there_is_no_bucket_called_none(answers, out):
    assert [b.bucket for b in judge_file(answers, Counting(), out).buckets] == [*Bucket, "all"]


def test_a_judge_that_wants_many_at_once_gets_them_and_none_twice(tmp_path, out):
    class Many(Counting):
        batches = ()

        def judge_many(self, rows):
            if any(r.response == self.fails_at for r in rows):
                raise ConnectionError
            self.batches = (*self.batches, len(rows))
            return [Counting.judge(self, r.prompt, r.response, r.bucket, truncated=r.truncated) for r in rows]

    rows = [row(i) for i in (*range(40), 3, *range(40, 70), 3, 69)]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ConnectionError):
        judge_file(path, Many(fails_at=rows[-3]["response"]), out)
    assert len(lines(journal_of(out))) == 64
    ticks = []
    judge = Many()
    judge_file(path, judge, out, lambda _what, total: ticks.append(-total) or ticks.append)
    assert judge.batches == (6,) and sum(ticks) == 0, "every row is ticked off once"
    assert [v["id"] for v in lines(out)] == [r["id"] for r in rows]
    alone = out.with_name("alone.jsonl")
    judge_file(path, Counting(), alone)
    assert alone.read_bytes() == out.read_bytes()


class Streaming(Counting):
    """Four under way at once, answered last in first out; what is under way at a failure is given out before it."""

    def judge_stream(self, rows):
        under_way, failed = [], None
        rows = enumerate(rows)
        while True:
            while not failed and len(under_way) < 4 and (drawn := next(rows, None)):
                under_way.append(drawn)
            if not under_way:
                break
            i, r = under_way.pop()
            try:
                yield i, self.judge(r.prompt, r.response, r.bucket, truncated=r.truncated)
            except ConnectionError as error:
                failed = error
        if failed:
            raise failed


def test_a_judge_with_several_under_way_gives_the_same_file_and_loses_nothing_when_it_fails(tmp_path, out):
    rows = [row(i) for i in (0, 0, *range(1, 20), 3, *range(20, 30), 19)]  # the first two are under way together
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ConnectionError) as caught:
        judge_file(path, Streaming(fails_at=row(8)["response"]), out)
    kept = {v["id"] for v in lines(journal_of(out))}
    assert len(kept) == len(lines(journal_of(out))) >= 8 and "q8" not in kept
    first = min(i for i in range(30) if f"q{i}" not in kept)
    assert f"{path}:{first + 2};" in caught.value.__notes__[0] and str(journal_of(out)) in caught.value.__notes__[0]
    ticks = []
    judge = Streaming()
    judge_file(path, judge, out, lambda _what, total: ticks.append(-total) or ticks.append)
    assert len(judge.asked) == 30 - len(kept) and sum(ticks) == 0, "every row is ticked off once"
    alone = out.with_name("alone.jsonl")
    judge_file(path, Counting(), alone)
    assert alone.read_bytes() == out.read_bytes()


# --- nothing is judged twice ----------------------------------------------------------------------------------------


def test_a_second_run_asks_nobody_and_changes_nothing(answers, out):
    first = judge_file(answers, Counting(), out)
    content = out.read_bytes()
    again = Counting()
    second = judge_file(answers, again, out)
    assert again.asked == [] and second.asked == 0 and second.buckets == first.buckets
    assert out.read_bytes() == content


def test_equal_completions_are_judged_once_and_each_gets_its_line(tmp_path, out):
    judge = Counting()
    rows = [row(1), {**row(1), "id": "twin"}, row(2), {**row(1), "id": "third"}]
    assert judge_file(write(tmp_path / "a.jsonl", rows), judge, out).asked == 2
    assert [v["id"] for v in lines(out)] == ["q1", "twin", "q2", "third"]
    assert len({v["key"] for v in lines(out)}) == 2


@pytest.mark.parametrize("change", [{"prompt": "other"}, {"response": "b other"}, {"bucket": "edit"}, {"truncated": True}])
def test_whatever_the_judge_is_shown_makes_another_verdict(tmp_path, out, change):
    judge = Counting()
    judge_file(write(tmp_path / "a.jsonl", [row(1), {**row(1), **change}]), judge, out)
    assert len(judge.asked) == 2
    assert len({v["key"] for v in lines(out)}) == 2


def test_prompt_and_response_do_not_run_into_each_other(tmp_path, out):
    rows = [{"prompt": "ab", "response": "c"}, {"prompt": "a", "response": "bc"}]
    judge_file(write(tmp_path / "a.jsonl", rows), Counting(), out)
    assert len({v["text_sha256"] for v in lines(out)}) == 2


def test_a_longer_or_reordered_file_pays_for_what_is_new_only(tmp_path, answers, out):
    judge_file(answers, Counting(), out)
    rows = [row(i, bucket=list(Bucket)[i % 3]) for i in (11, *range(9, -1, -1), 10)]
    judge = Counting()
    assert judge_file(write(answers, rows), judge, out).asked == 2
    assert judge.asked == [rows[0]["response"], rows[-1]["response"]]
    assert [v["id"] for v in lines(out)] == [r["id"] for r in rows]


# --- kills and failures ---------------------------------------------------------------------------------------------


def test_a_judge_that_raises_keeps_what_it_judged_and_goes_on_from_there(answers, out):
    with pytest.raises(ConnectionError) as caught:
        judge_file(answers, Counting(fails_at="e answer 4"), out)
    assert f"{answers}:5" in caught.value.__notes__[0] and str(journal_of(out)) in caught.value.__notes__[0]
    assert not out.exists()
    assert [v["id"] for v in lines(journal_of(out))] == ["q0", "q1", "q2", "q3"]
    judge = Counting()
    assert judge_file(answers, judge, out).asked == 6
    assert judge.asked[0] == "e answer 4"
    assert [v["id"] for v in lines(out)] == [f"q{i}" for i in range(10)] and not journal_of(out).exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from paving.evaluation.judges import RuleJudge
from paving.evaluation.judging import judge_file

class Killed(RuleJudge):
    n = 0
    def judge(self, *shown, **more):
        Killed.n += 1
        if Killed.n == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().judge(*shown, **more)

judge_file(Path(sys.argv[1]), Killed(), Path(sys.argv[2]))
"""


def test_a_killed_process_loses_no_verdict(answers, out):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, answers, out], check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(lines(journal_of(out))) == 6
    done = judge_file(answers, RuleJudge(), out)
    assert (done.asked, len(lines(out))) == (4, 10)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_journal_cut_at_any_byte_loses_the_torn_line_only(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    rows = [row(i, response=f"{chr(97 + i)} ä\u2028{i}") for i in range(4)]
    answers = write(folder / "a.jsonl", rows)
    whole = folder / "whole.jsonl"
    judge_file(answers, Counting(), whole)
    content = whole.read_bytes()
    at = data.draw(st.integers(0, len(content)))
    out = folder / "out.jsonl"
    journal_of(out).write_bytes(content[:at])
    judge = Counting()
    judge_file(answers, judge, out)
    assert len(judge.asked) == 4 - content[:at].count(b"\n")
    assert out.read_bytes() == content and not journal_of(out).exists()


def test_verdicts_appended_after_a_torn_line_are_whole_lines(answers, out):
    with pytest.raises(ConnectionError):
        judge_file(answers, Counting(fails_at="e answer 4"), out)
    journal = journal_of(out)
    journal.write_bytes(journal.read_bytes()[:-30])
    with pytest.raises(ConnectionError):
        judge_file(answers, Counting(fails_at="h answer 7"), out)
    assert [v["id"] for v in lines(journal)] == [f"q{i}" for i in range(7)]


def test_a_torn_tail_longer_than_a_block_is_cut(answers, out):
    out.parent.mkdir()
    with pytest.raises(ConnectionError):
        judge_file(answers, Counting(fails_at="c answer 2"), out)
    good = journal_of(out).read_bytes()
    for tail in (b"x" * 70_000, b"x" * 65_536, b"x"):
        journal_of(out).write_bytes(good + tail)
        with pytest.raises(ConnectionError):
            judge_file(answers, Counting(fails_at="c answer 2"), out)
        assert journal_of(out).read_bytes() == good


def test_a_bad_row_is_found_before_the_judge_is_asked_anything(tmp_path, out):
    path = write(tmp_path / "a.jsonl", [row(0), row(1), {"prompt": "p"}])
    judge = Counting()
    with pytest.raises(ValueError, match=r"a\.jsonl:3: no `response`"):
        judge_file(path, judge, out)
    assert judge.asked == [] and not out.parent.exists()


def test_a_file_that_changes_meanwhile_gives_no_verdict_file(answers, out):
    class Meddling(Counting):
        def judge(self, *shown, **more):
            if len(self.asked) == 9:
                write(answers, [row(i + 50) for i in range(10)])
            return super().judge(*shown, **more)

    with pytest.raises(ValueError, match=r"answers\.jsonl:1 changed while it was being judged"):
        judge_file(answers, Meddling(), out)
    assert not out.exists() and len(lines(journal_of(out))) == 10


# --- scale ----------------------------------------------------------------------------------------------------------


def test_texts_and_reasons_that_no_encoding_holds_are_judged(tmp_path, out):
    class Odd(Counting):
        def judge(self, prompt, response, bucket, *, truncated=False):
            return Verdict(Label.HARMLESS_BROKEN, "half \ud800\x00[red]")

    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "\\udfff", "prompt": "p\\ud800", "response": "\\u0000\\udc00"}\n')
    for asked in (1, 0):
        assert judge_file(path, Odd(), out).asked == asked
        (verdict,) = read_verdicts(out)
        assert (verdict.id, verdict.reason) == ("\udfff", "half \ud800\x00[red]")


def test_memory_does_not_grow_with_the_file_nor_with_its_verdicts(tmp_path, out):
    path = tmp_path / "many.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps(row(i, response=f"a{i}" + " word" * 300)) + "\n" for i in range(2000))

    class Forgetful(Counting):
        def judge(self, prompt, response, bucket, *, truncated=False):
            return Verdict(Label.HARMLESS_BENIGN, f"a reason of its own: {hash(response)}")

    tracemalloc.start()
    for _ in range(2):
        judge_file(path, Forgetful(), out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 3e6 and out.stat().st_size > 6e5
    assert peak < 3e5


def test_the_first_verdict_for_a_key_stays():
    known = KnownVerdicts()
    known.add("k", Verdict(Label.HARMFUL, "first"), finished=False)
    known.add("k", Verdict(Label.HARMLESS_BENIGN, "second"), finished=True)
    assert known.get("k") == Verdict(Label.HARMFUL, "first") and known.get("other") is None
    known.close()


def test_judging_and_comparing_do_not_wait_for_torch():
    code = "import sys, paving.evaluation.judging, paving.evaluation.agreement; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
