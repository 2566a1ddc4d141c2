"""Copies of prompts in other clothes: the same request in the same bucket and group, however it is said."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paving.prompts.clothes import WARDROBE, dressed
from paving.prompts.types import Bucket, Prompt, Role, Turn

WORDS = st.text("abcXYZ {}?", min_size=1, max_size=30)


def prompt(name: str, text: str = "How do I {kill} a process?") -> Prompt:
    return Prompt(name, text, Bucket.HARMFUL_KEEP, f"group of {name}", target="a target", source="somewhere")


@given(texts=st.lists(WORDS, min_size=1, max_size=4), copies=st.integers(0, len(WARDROBE)), seed=st.integers(0, 9))
def test_a_copy_asks_the_same_in_the_same_place(texts, copies, seed):
    prompts = [prompt(f"p{i}", text) for i, text in enumerate(texts)]
    found = dressed(prompts, copies, seed)
    assert len(found) == copies * len(prompts) == len({p.id for p in found})
    for i, one in enumerate(found):
        of = prompts[i // copies]
        assert (one.bucket, one.group, one.target, one.source) == (of.bucket, of.group, of.target, of.source)
        assert one.id.startswith(of.id)
        assert of.text.lower().rstrip("?.! ") in one.text.lower()
        assert one.messages[-1]["role"] == "user"


def test_what_a_prompt_is_given_does_not_depend_on_what_stands_beside_it():
    prompts = [prompt(f"p{i}") for i in range(20)]
    forwards, backwards = dressed(prompts, 3, 0), dressed(prompts[::-1], 3, 0)
    assert sorted(forwards, key=lambda p: p.id) == sorted(backwards, key=lambda p: p.id)
    assert dressed(prompts, 3, 1) != forwards
    kinds = {p.id.split(" (")[1] for p in forwards}
    assert kinds == {f"{kind})" for kind in WARDROBE}


def test_a_conversation_keeps_its_own_turns_last_and_speakers_take_turns():
    earlier = (Turn(Role.USER, "first"), Turn(Role.ASSISTANT, "second"))
    one = Prompt("p", "third", Bucket.EDIT, "g", history=earlier)
    for seed in range(9):
        worn = WARDROBE["earlier turns"](one, Random(seed))
        assert worn.history[-2:] == earlier and worn.text == "third"
        roles = [m["role"] for m in worn.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def test_hardly_two_prompts_wear_the_same():
    prompts = [prompt(f"p{i}", "How do I kill a process?") for i in range(60)]
    for kind in set(WARDROBE) - {"lower case", "capitals"}:
        assert len({p.messages.__repr__() for p in dressed(prompts, 1, 0, [kind])}) > 30, kind


def test_only_kinds_that_are_asked_for_are_worn():
    assert {p.text for p in dressed([prompt("p", "Hello")], 1, 0, ["capitals"])} == {"HELLO"}
    with pytest.raises(ValueError, match="2 copies of a prompt are more than the 1 kinds of clothes: capitals"):
        dressed([prompt("p")], 2, 0, ["capitals"])
