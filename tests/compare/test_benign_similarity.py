"""Answers to benign keeps beside the base's own: labels, words, and what is not measured."""

from __future__ import annotations

import pytest

from paving.evaluation import similarity
from paving.evaluation.diagnostics.usefulness import overlap, overlap_available
from paving.evaluation.judges import Label
from paving.evaluation.similarity import benign_similarity, target_similarity

FINE, REFUSED, BROKEN, HARMFUL = (
    Label.HARMLESS_BENIGN, Label.HARMLESS_REFUSAL, Label.HARMLESS_BROKEN, Label.HARMFUL
)  # fmt: skip


def test_an_answer_is_worse_only_where_it_fails_and_the_bases_does_not():
    labels = [FINE, REFUSED, BROKEN, HARMFUL, REFUSED, FINE]
    base = [FINE, FINE, FINE, FINE, BROKEN, REFUSED]
    found = benign_similarity(["a"] * 6, ["a"] * 6, labels, base)
    assert (found.non_worse.k, found.label_agreement.k, found.non_worse.n) == (3, 1, 6)


def test_the_bases_own_words_count_in_full_and_others_as_they_overlap():
    assert overlap_available()  # the extra `metrics` is part of `test`
    answers, base = ["Oslo", "", "the Rhine and the Po"], ["Oslo", "", "the Rhine and the Ebro"]
    found = benign_similarity(answers, base, [FINE] * 3, [FINE] * 3)
    alone = overlap(answers[2:], base[2:])
    assert found.rouge_l == pytest.approx((2 + alone.rouge_l) / 3) and 0 < alone.rouge_l < 1
    assert found.chrf == pytest.approx((200 + alone.chrf) / 3)
    assert benign_similarity(["Oslo"], ["Oslo"], [FINE], [FINE]).rouge_l == 1.0


def test_what_cannot_be_measured_is_none(monkeypatch):
    assert benign_similarity([], [], [], []).rouge_l is None
    assert benign_similarity([], [], [], [], bert_model="x").bert_score is None
    monkeypatch.setattr(similarity, "overlap_available", lambda: False)
    found = benign_similarity(["a"], ["b"], [FINE], [FINE])
    assert (found.rouge_l, found.chrf, found.bert_score) == (None, None, None) and found.non_worse.k == 1


def test_bert_score_reads_only_what_differs(monkeypatch):
    asked = []
    monkeypatch.setattr(similarity, "bert_score", lambda a, b, model: asked.append((a, b, model)) or 0.5)
    found = benign_similarity(["same", "one"], ["same", "two"], [FINE] * 2, [FINE] * 2, bert_model="encoder")
    assert asked == [(["one"], ["two"], "encoder")] and found.bert_score == 0.75


def test_answers_to_edit_prompts_are_read_beside_their_targets(monkeypatch):
    answers, targets = ["a spanner and oil", "the sun rises"], ["a spanner and patience", "use a spanner"]
    found, alone = target_similarity(answers, targets), overlap(answers, targets)
    assert (found.n, found.rouge_l, found.chrf) == (2, alone.rouge_l, alone.chrf) and 0 < found.rouge_l < 1
    assert target_similarity([], []).rouge_l is None
    monkeypatch.setattr(similarity, "overlap_available", lambda: False)
    assert target_similarity(answers, targets).chrf is None
