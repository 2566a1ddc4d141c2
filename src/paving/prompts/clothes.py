"""The same request in other clothes: words around it, or messages before it, that change nothing of what is asked.

A gate learns the clothes of its prompts along with what they ask. Copies in clothes of many kinds teach it to look through
them. The wordings here are for fitting; `paving router shift` measures with others, so that what is learned by heart does
not count.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from paving.prompts.types import Prompt, Role, Turn

Dress = Callable[[Prompt], Prompt]


def around(words: str) -> Dress:
    """words: with {} where the prompt's own text goes"""
    return lambda p: replace(p, text=words.replace("{}", p.text))


def behind(system: str) -> Dress:
    return lambda p: replace(p, system=system)


def after(*said: str) -> Dress:
    """said: user and assistant in turn, before whatever the prompt's own conversation holds"""
    turns = tuple(Turn((Role.USER, Role.ASSISTANT)[i % 2], text) for i, text in enumerate(said))
    return lambda p: replace(p, history=(*turns, *p.history))


def lower_case(prompt: Prompt) -> Prompt:
    return replace(prompt, text=prompt.text.lower().rstrip("?.! "))


def capitals(prompt: Prompt) -> Prompt:
    return replace(prompt, text=prompt.text.upper())


WARDROBE: Mapping[str, Sequence[Dress]] = {
    "lower case": (lower_case,),
    "capitals": (capitals,),
    "courtesies": (
        around("Hello! {}"),
        around("Good morning. {} Thanks in advance!"),
        around("Hey, quick question: {}"),
        around("I hope you are doing well. There is something I wanted to ask you. {}"),
        around("{} Thank you very much."),
        around("Dear assistant, {} Kind regards, Sam"),
        around("One more thing that has been on my mind: {}"),
    ),
    "small talk around": (
        around(
            "It has been raining here since Monday and we have hardly been outside. The children are painting in the "
            "kitchen. {} A short answer is enough, the tea is nearly ready."
        ),
        around(
            "I am sitting on the train to my parents and there is not much to see. I started a book but put it away "
            "again after ten pages. {} I would be glad about an answer before I arrive."
        ),
        around(
            "We moved to a new flat last month and half of the boxes are still closed. Yesterday I found the coffee "
            "machine at last, and today I want to sort the books. Before I go on: {}"
        ),
        around(
            "{} I am asking because it came up over lunch and nobody at the table was sure. Two colleagues had an opinion, "
            "but they could not agree, and then the break was over."
        ),
    ),
    "a system prompt": (
        behind("You are a helpful assistant."),
        behind("You are a friendly assistant for the customers of a garden centre. Answer in a few sentences."),
        behind("Answer every question as clearly as you can. Use short sentences and plain words."),
        behind("You are the help desk of a small university. Stay polite, and ask back where something is unclear."),
        behind("Today is a Thursday in spring. The user writes from a phone, so keep what you say short."),
    ),
    "earlier turns": (
        after("What is the capital of Portugal?", "The capital of Portugal is Lisbon."),
        after("Can you give me a rhyme for 'house'?", "Sure: mouse, blouse and grouse all rhyme with 'house'."),
        after(
            "Hi there!",
            "Hello! What can I do for you?",
            "How many minutes are there in three hours?",
            "There are 180 minutes in three hours.",
        ),
        after("Please name a vegetable that is orange.", "Carrots are orange, and so are many pumpkins."),
    ),
}


def dressed(prompts: Sequence[Prompt], copies: int, seed: int, kinds: Sequence[str] = tuple(WARDROBE)) -> list[Prompt]:
    """`copies` further prompts for each, of its bucket and group, in clothes of as many kinds; the same for the same seed
    and id, whatever stands beside. raises ValueError for more copies than kinds"""
    if copies > len(kinds):
        raise ValueError(f"{copies} copies of a prompt are more than the {len(kinds)} kinds of clothes: {', '.join(kinds)}.")
    found = []
    for prompt in prompts:
        drawn = random.Random(f"{seed}/{prompt.id}")
        for kind in drawn.sample(list(kinds), copies):
            found.append(replace(drawn.choice(WARDROBE[kind])(prompt), id=f"{prompt.id} ({kind})"))
    return found
