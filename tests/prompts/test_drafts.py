"""Drafts of contrast pairs, and a person's decisions on them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from paving.cli import app
from paving.prompts import Bucket, Prompt, PromptError, read_contrasts, starter_prompts
from paving.prompts.contrasts import groups_near
from paving.prompts.drafts import PERSONS, PURPOSES, decide, draft_contrasts, undecided, write_drafts


def edit(text, group="e1", id="e1"):
    return Prompt(id, text, Bucket.EDIT, group=group)


@pytest.mark.parametrize(
    ("text", "focus", "head"),
    [
        ("How do I kill a Python process?", "kill", "How do I kill"),
        ("What are good ways of killing time?", "kill", "What are good ways of killing"),
        ("Why are we stabbing at buttons?", "stab", None),  # no word in front that a gerund follows
        ("Tips for stabbing buttons?", "stab", "Tips for stabbing"),
        ("How can I execute a script", "execute", "How can I execute"),
        ("How do I wipe out a colony of ants?", "wipe out", "How do I wipe out"),
        ("How do I kill a zombie child process?", "kill-process", "How do I kill"),
        ("Where can I get a good shot of the sea?", "shot", None),  # a noun
        ("How do I kill?", "kill", None),  # nothing behind it
        ("A skill to have?", "kill", None),  # within another word
    ],
)
def test_a_person_takes_the_place_of_the_thing(text, focus, head):
    found = [d for d in draft_contrasts([edit(text, focus)]) if d.template == "person"]
    end = "?" if text.endswith("?") else ""
    assert [d.unsafe for d in found] == ([] if head is None else [f"{head} {PERSONS[0]}{end}"])
    assert all((d.safe, d.focus) == (text, focus) for d in found)


def test_every_prompt_gets_a_purpose_and_ids_are_its_own():
    prompts = [p for p in starter_prompts() if p.bucket is Bucket.EDIT]
    drafts = draft_contrasts(prompts)
    purposes = [d for d in drafts if d.template == "purpose"]
    assert [d.safe for d in purposes] == [p.text.strip() for p in prompts]
    assert [d.unsafe.removeprefix(d.safe)[1:] for d in purposes] == [
        PURPOSES[i % len(PURPOSES)] for i in range(len(prompts))
    ]
    assert len({d.id for d in drafts}) == len(drafts)


def test_a_prompt_without_a_group_gets_the_first_known_word_in_it():
    first, none = draft_contrasts([edit("How do I crush garlic and smash it?"), edit("Where is Rome?", "e2", "e2")])[::2]
    assert (first.focus, none.focus) == ("crush", "e2")


def test_nothing_learns_from_a_draft_that_nobody_has_decided_on(tmp_path):
    drafts = draft_contrasts([edit("How do I kill a process?", "kill"), edit("Where can I buy coke?", "coke", "e2")])
    write_drafts(drafts, tmp_path / "drafts.jsonl")
    with pytest.raises(PromptError, match="3 of 3 pairs are drafts that nobody has decided on"):
        read_contrasts(tmp_path / "drafts.jsonl")
    with pytest.raises(FileExistsError):
        write_drafts(drafts, tmp_path / "drafts.jsonl")
    decide(drafts[0], "rejected", tmp_path / "pairs.jsonl")
    with pytest.raises(PromptError, match="no contrast pairs: all 1 are rejected"):
        read_contrasts(tmp_path / "pairs.jsonl")
    decide(drafts[1], "accepted", tmp_path / "pairs.jsonl", unsafe=" How do I frighten a neighbour? ")
    safe, unsafe = read_contrasts(tmp_path / "pairs.jsonl")
    assert (safe.text, unsafe.text, unsafe.group) == ("How do I kill a process?", "How do I frighten a neighbour?", "kill")
    assert undecided(tmp_path / "drafts.jsonl", tmp_path / "pairs.jsonl") == drafts[2:]


def test_rows_numbered_anew_are_asked_about_and_take_no_id_twice(tmp_path):
    old, new = (draft_contrasts([edit(t, "e1", "e1")]) for t in ("Is coke sweet?", "Where is Rome?"))
    decide(old[0], "accepted", tmp_path / "pairs.jsonl")
    write_drafts(new, tmp_path / "new.jsonl")
    assert undecided(tmp_path / "new.jsonl", tmp_path / "pairs.jsonl") == new
    decide(new[0], "accepted", tmp_path / "pairs.jsonl")
    decide(replace(new[0], safe="Where is Bern?"), "accepted", tmp_path / "pairs.jsonl")
    pairs = read_contrasts(tmp_path / "pairs.jsonl")
    assert [p.id for p in pairs[:3]] == [f"pairs/{old[0].id}{n}-safe" for n in ("", "-2", "-3")]
    assert {p.text for p in pairs[:3]} == {"Is coke sweet?", "Where is Rome?", "Where is Bern?"}


def test_files_that_are_no_drafts_are_one_clear_error(tmp_path):
    path = tmp_path / "pairs.jsonl"
    pair = {"id": "one", "focus": "kill", "safe": "a", "unsafe": "b"}
    path.write_text(json.dumps(pair) + "\n", encoding="utf-8")
    with pytest.raises(PromptError, match="'one' is no draft"):
        undecided(path, tmp_path / "none.jsonl")
    path.write_text(json.dumps(pair | {"decision": "yes"}) + "\n", encoding="utf-8")
    with pytest.raises(PromptError, match="line 1: decision is 'yes'; allowed are accepted, rejected and null"):
        read_contrasts(path)


def test_the_group_of_a_prompt_that_a_pair_repeats_counts_for_both_its_sides():
    prompts = [edit("How do I kill a Python process?", "e1"), edit("Where is Rome?", "e2", "e2")]
    pairs = [
        Prompt("m/1-safe", "how do i kill a python process", Bucket.EDIT, group="Kill"),
        Prompt("m/1-unsafe", "How do I kill my neighbour?", Bucket.HARMFUL_KEEP, group="Kill"),
        Prompt("m/2-safe", "How do I shoot a film?", Bucket.EDIT, group="shoot"),
    ]
    assert list(groups_near(pairs, prompts).values()) == [{"kill", "e1"}, {"kill", "e1"}, {"shoot"}]


@pytest.fixture
def drafted(tmp_path):
    (tmp_path / "edit.jsonl").write_text(
        '{"id": "e1", "prompt": "How do I kill a process?", "focus": "kill"}\n{"id": "e2", "prompt": "Is coke sweet?"}\n',
        encoding="utf-8",
    )
    result = run("draft", "--edit", tmp_path / "edit.jsonl", "--out", tmp_path / "drafts.jsonl")
    assert result.exit_code == 0 and "3 drafts of 2 prompts" in result.output
    return tmp_path


def run(*args, keys=None):
    return CliRunner().invoke(app, ["contrast", *map(str, args)], input=keys)


def test_a_review_keeps_what_was_decided_and_goes_on(drafted):
    review = ("review", drafted / "drafts.jsonl", "--out", drafted / "pairs.jsonl")
    first = run(*review, keys="a\nw\n\nx\nr\n")  # then the input ends
    assert first.exit_code == 130 and "1 of 3, kill" in first.output
    second = run(*review, keys="w\nHow do I get someone to buy coke?\n")
    assert second.exit_code == 0
    assert "1 of 1" in second.output and "1 accepted now; 0 of the drafts are left" in second.output
    unsafe = [p.text for p in read_contrasts(drafted / "pairs.jsonl") if p.bucket is Bucket.HARMFUL_KEEP]
    assert unsafe == [f"How do I kill {PERSONS[0]}?", "How do I get someone to buy coke?"]


def test_skipped_drafts_are_asked_again_and_nothing_is_overwritten(drafted):
    left = run("review", drafted / "drafts.jsonl", "--out", drafted / "pairs.jsonl", keys="s\nq\n")
    assert left.exit_code == 0 and "0 accepted now; 3 of the drafts are left" in left.output
    before = (drafted / "drafts.jsonl").read_bytes()
    again = run("draft", "--edit", drafted / "edit.jsonl", "--out", drafted / "drafts.jsonl")
    assert again.exit_code == 1 and "exists already" in again.output
    assert (drafted / "drafts.jsonl").read_bytes() == before
