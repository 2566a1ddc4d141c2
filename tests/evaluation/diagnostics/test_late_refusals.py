"""Late refusals: counted among refusals, by the answer's own tokens."""

from __future__ import annotations

from paving.evaluation.diagnostics.lateness import late_refusals
from paving.evaluation.judges import Label, Verdict
from paving.generation import Completion


class SaysNo:
    name = "says-no"

    def judge(self, prompt, response, bucket, *, truncated=False):
        return Verdict(Label.HARMLESS_REFUSAL if "no" in response.split() else Label.HARMLESS_BENIGN, "word")


def answer(name, words):
    return Completion(name, "edit", "p", " ".join(words), len(words), True, gate=0.0)


def cut(text, n):
    return " ".join(text.split()[:n])


def test_a_refusal_is_late_where_its_beginning_is_none():
    answers = [
        answer("early", ["no"] + ["x"] * 40),
        answer("late", ["x"] * 20 + ["no"] + ["x"] * 20),
        answer("very late", ["x"] * 39 + ["no"]),
        answer("never", ["x"] * 41),
    ]
    found = {f.length: f for f in late_refusals(answers, SaysNo(), cut, (16, 32, 64))}
    assert (found[16].share.k, found[16].share.n) == (2, 3)
    assert (found[32].share.k, found[32].share.n) == (1, 3)
    assert (found[64].share.k, found[64].n_long) == (0, 0)
    assert found[16].n_long == 3


def test_without_refusals_the_share_is_missing_and_not_zero():
    found = late_refusals([answer("never", ["x"] * 41)], SaysNo(), cut, (16,))[0]
    assert found.share.rate is None and found.share.n == 0
