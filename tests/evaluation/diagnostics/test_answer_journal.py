"""Answers of variants: closed gates are the base's, each edited answer is decoded once, and a kill loses one batch."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from paving.controller import AlwaysOpen, Oracle
from paving.evaluation.diagnostics.answers import AnswerJournal, answers
from paving.generation import Decoding, generate
from paving.intervention import Identity, RowState
from paving.prompts.types import Bucket
from tiny_models import lively

DECODING = Decoding(max_new_tokens=5)


def key_of(p, state):
    return f"{p.id}/{state.gate}"


@pytest.fixture
def base(backbone, prompts):
    return {c.id: c for c in generate(backbone, prompts, Identity(), DECODING)}


def by_oracle(prompts):
    return {p.id: RowState(gate=float(p.bucket == Bucket.EDIT), logit=0.5) for p in prompts}


def ask(backbone, prompts, base, journal, intervention, states, ticks=None, **changes):
    tick = None if ticks is None else ticks.append
    return answers(backbone, prompts, intervention, states, base, key_of, DECODING, journal, tick=tick, **changes)


def test_only_open_gates_are_decoded_and_they_are_the_interventions_own(backbone, prompts, base, tmp_path):
    journal = AnswerJournal(tmp_path / "answers.jsonl")
    found = ask(backbone, prompts, base, journal, lively(backbone, policy=Oracle()), by_oracle(prompts))
    assert [c.id for c in found] == [p.id for p in prompts]
    edit = [p for p in prompts if p.bucket == Bucket.EDIT]
    expected = {c.id: c for c in generate(backbone, edit, lively(backbone, policy=AlwaysOpen()), DECODING)}
    for p, c in zip(prompts, found, strict=True):
        own = expected.get(p.id, base[p.id])
        assert c.response == own.response and c.logit == 0.5 and c.gate == float(p.id in expected)
    assert any(expected[p.id].response != base[p.id].response for p in edit)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == len(edit)


def test_what_stands_in_the_journal_is_not_decoded_again(backbone, prompts, base, tmp_path):
    path = tmp_path / "answers.jsonl"
    controller = lively(backbone, policy=Oracle())
    first = ask(backbone, prompts, base, AnswerJournal(path), controller, by_oracle(prompts))
    before, ticks = path.read_bytes(), []

    class Never:
        name = "never"

        def apply(self, *_args, **_kwargs):
            raise AssertionError("decoded again")

    second = ask(backbone, prompts, base, AnswerJournal(path), Never(), by_oracle(prompts), ticks)
    assert second == first and path.read_bytes() == before and sum(ticks) == len(prompts)


def test_a_run_killed_between_batches_goes_on_behind_the_last_whole_line(backbone, prompts, base, tmp_path):
    path, whole = tmp_path / "answers.jsonl", tmp_path / "whole.jsonl"
    controller = lively(backbone, policy=Oracle())
    expected = ask(backbone, prompts, base, AnswerJournal(whole), controller, by_oracle(prompts), batch_size=1)
    lines = whole.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:40])
    found = ask(backbone, prompts, base, AnswerJournal(path), controller, by_oracle(prompts), batch_size=1)
    assert found == expected
    assert path.read_bytes() == whole.read_bytes(), "the torn line is cut off before anything is appended"


def test_another_gate_is_another_answer(backbone, prompts, base, tmp_path):
    journal = AnswerJournal(tmp_path / "answers.jsonl")
    full = by_oracle(prompts)
    ask(backbone, prompts, base, journal, lively(backbone, policy=Oracle()), full)
    half = {i: replace(s, gate=s.gate / 2) for i, s in full.items()}
    ask(backbone, prompts, base, journal, lively(backbone, policy=Oracle(), scale=0.5), half)
    keys = [json.loads(line)["key"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(set(keys)) == len(keys) == 2 * sum(s.gate > 0 for s in full.values())
