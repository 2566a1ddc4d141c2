"""Conversations as prompts: read from a list of messages, rendered whole, told apart from what they end with."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paving.prompts import (
    Bucket,
    Prompt,
    PromptError,
    Role,
    Turn,
    drop_exact_duplicates,
    find_leakage,
    group_near_duplicates,
    read_prompts,
)  # fmt: skip
from paving.prompts.types import Splits

said = st.text(min_size=1, max_size=20).filter(str.strip)


def message(role, content):
    return {"role": role, "content": content}


EARLIER = [message("user", "Who wrote it?"), message("assistant", "She did.")]
HISTORY = (Turn(Role.USER, "Who wrote it?"), Turn(Role.ASSISTANT, "She did."))


@pytest.fixture
def read(tmp_path):
    def read(cell, column="messages", **more):
        path = tmp_path / "talks.jsonl"
        path.write_text(json.dumps({column: cell, **more}) + "\n", encoding="utf-8")
        return read_prompts(path, Bucket.EDIT)[0]

    return read


@settings(max_examples=40, deadline=None)
@given(system=st.none() | said, turns=st.lists(said, min_size=1, max_size=7).filter(lambda t: len(t) % 2 == 1))
def test_what_is_asked_is_what_stood_there(tmp_path_factory, system, turns):
    messages = [message("assistant" if n % 2 else "user", text) for n, text in enumerate(turns)]
    messages = messages if system is None else [message("system", system), *messages]
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    path.write_text(json.dumps({"prompt": messages}), encoding="utf-8")
    prompt = read_prompts(path, Bucket.EDIT)[0]
    assert prompt.messages == messages and (prompt.text, prompt.system) == (turns[-1], system)


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_the_last_turn_is_the_request_and_the_rest_its_history(read, column):
    found = read(
        [*EARLIER, message("user", "When?")], column, id="talk", focus="book", target="In 1901.", system="Be brief."
    )
    assert found == Prompt("talk", "When?", Bucket.EDIT, "book", target="In 1901.", system="Be brief.", history=HISTORY)


def test_one_message_is_a_prompt_as_any_other(read):
    assert read([message("user", "When?")], id="a") == read("When?", "prompt", id="a")


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ([], r"talks.jsonl:1: `messages`: the conversation has no message of the user"),
        ([message("system", "Be brief.")], "has no message of the user"),
        (EARLIER, "ends with the assistant's turn, so that there is nothing to answer.*`target`"),
        ([message("assistant", "Hello.")], r"`messages`, message 1: the role is 'assistant' where 'user' was expected"),
        ([*EARLIER, message("assistant", "More.")], "message 3: the role is 'assistant' where 'user'"),
        (
            [message("system", "a"), message("user", "b"), message("user", "c")],
            "message 3: the role is 'user' where 'assist",
        ),
        ([*EARLIER, message("system", "Now this.")], "message 3: the role is 'system'"),
        ([message("user", "  ")], "message 1 is blank"),
        ([message("user", None)], "message 1 is blank"),
        ([message("user", [{"type": "text", "text": "w"}])], "message 1 is .* no string"),
        ([message("user", "half \ud800")], "message 1 holds half of a surrogate pair at character 5"),
        (["When?"], "message 1 is no message with a role"),
        ([{"content": "When?"}], "message 1 is no message with a role"),
        ([{**message("user", "When?"), "tool_calls": [1]}], r"has \['tool_calls'\] beside `role` and `content`"),
    ],
)
def test_a_conversation_that_cannot_be_asked_is_named(read, cell, says):
    with pytest.raises(PromptError, match=says):
        read(cell)


def test_two_system_prompts_are_one_too_many(read):
    with pytest.raises(PromptError, match="a system prompt in `messages` and in `system`"):
        read([message("system", "Be brief."), message("user", "When?")], system="Be long.")


def test_empty_fields_of_a_message_are_no_content(read):
    assert read([{**message("user", "When?"), "name": None}]).text == "When?"


# --- told apart from what they end with ------------------------------------------------------------------------------

ALONE = Prompt("a", "When was it written, and where?", Bucket.EDIT, "a")
TALK = replace(ALONE, id="b", group="b", history=HISTORY)


def test_a_question_and_a_conversation_that_ends_with_it_are_two_prompts():
    assert drop_exact_duplicates([ALONE, TALK]) == ((ALONE, TALK), ())
    assert len({p.group for p in group_near_duplicates([ALONE, TALK])}) == 2
    assert not find_leakage(Splits((ALONE,), (), (TALK,)))


def test_equal_conversations_are_found_wherever_they_stand():
    again = replace(TALK, id="c", group="c")
    assert drop_exact_duplicates([again, TALK])[1] == ("c",)
    assert {p.group for p in group_near_duplicates([again, TALK])} == {"b"}
    kinds = [f.kind for f in find_leakage(Splits((TALK,), (), (replace(again, bucket=Bucket.HARMFUL_KEEP),))).findings]
    assert kinds == ["exact between buckets", "exact between splits"]


def test_names_of_what_is_kept_differ_wherever_what_is_asked_does():
    system = replace(TALK, system="")
    moved = replace(TALK, system="Who wrote it?", history=(), text=ALONE.text)
    every = [ALONE, TALK, system, moved, replace(TALK, system="Be brief."), replace(TALK, history=HISTORY * 2)]
    assert len({p.asked for p in every}) == len(every)


def test_a_judge_reads_what_came_before():
    assert ALONE.transcript == ALONE.text
    assert TALK.transcript == f"User: Who wrote it?\n\nAssistant: She did.\n\nUser: {ALONE.text}"
