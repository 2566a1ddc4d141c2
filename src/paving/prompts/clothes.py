"""The same request in other clothes: words around it, or messages before it, that change nothing of what is asked.

A gate learns the clothes of its prompts along with what they ask. Copies in clothes of many kinds teach it to look through
them. They are put together of parts, so that hardly two prompts wear the same: among a few fixed wordings a copy is always
near another in its own, and one that was never seen counts as unlike them all. `paving router shift` measures with wordings
that stand nowhere here, so that what is learned by heart does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random

from paving.prompts.types import Prompt, Role, Turn

OPENINGS = (
    "Hello!", "Good morning.", "Hey,", "Good evening!", "Dear assistant,", "Hi, it's me again.", "Excuse me,",
    "I hope you are doing well.", "Quick question:", "Sorry to bother you.", "Hello, I have a question.", "So,",
    "Here is something I wanted to ask:", "One more thing that has been on my mind:", "Can you tell me?", "Well then:",
)  # fmt: skip
CLOSINGS = (
    "Thanks in advance!", "Thank you very much.", "Kind regards, Sam", "I would be glad about an answer.", "Cheers!",
    "Have a nice day.", "I am curious.", "That is all I want to know.", "Much appreciated.", "Take your time.", "Best, Kim",
)  # fmt: skip
SMALL_TALK = (
    "It has been raining here since Monday and we have hardly been outside.",
    "The children are painting in the kitchen.",
    "I am sitting on the train to my parents, and there is not much to see.",
    "I started a book but put it away again after ten pages.",
    "We moved to a new flat last month, and half of the boxes are still closed.",
    "Yesterday I found the coffee machine at last.",
    "It came up over lunch, and nobody at the table was sure.",
    "Two colleagues had an opinion, but they could not agree, and then the break was over.",
    "My phone is nearly empty, so I write from the old computer.",
    "The dog has been asleep on the sofa since noon.",
    "On Saturday there is a fair in our town, and everyone talks about the weather.",
    "My brother called this morning from Lisbon.",
    "The bus was late again today.",
    "I have a cup of tea beside me and the whole evening to myself.",
    "We planted tomatoes on the balcony, and the first ones are turning red.",
    "A short answer is enough, the soup is nearly ready.",
    "I wrote it down so that I would not forget it.",
    "The radio is playing something slow.",
)
ROLES = (
    "You are a helpful assistant.",
    "You are a friendly assistant for the customers of a garden centre.",
    "You are the help desk of a small university.",
    "You assist the guests of a hotel by the sea.",
    "You are a chat assistant in a news app.",
    "You work for a company that sells bicycles.",
    "You are an AI model that talks with people of all ages.",
    "You support a team of engineers.",
)
MANNERS = (
    "Answer in a few sentences.",
    "Use short sentences and plain words.",
    "Stay polite, and ask back where something is unclear.",
    "Give examples where they help.",
    "Write in complete sentences and without lists.",
    "Say what you know and nothing else.",
    "The user writes from a phone, so keep what you say short.",
    "Be warm and patient.",
)
CIRCUMSTANCES = (
    "Today is a Thursday in spring.",
    "The conversation is in English.",
    "It is early in the morning where the user lives.",
    "The user has been a customer for three years.",
    "",
)
EXCHANGES = (
    ("What is the capital of Portugal?", "The capital of Portugal is Lisbon."),
    ("Can you give me a rhyme for 'house'?", "Sure: mouse, blouse and grouse all rhyme with 'house'."),
    ("Hi there!", "Hello! What can I do for you?"),
    ("How many minutes are there in three hours?", "There are 180 minutes in three hours."),
    ("Please name a vegetable that is orange.", "Carrots are orange, and so are many pumpkins."),
    ("Are you there?", "Yes, I am here. What would you like to talk about?"),
    ("Which month comes after April?", "May comes after April."),
    ("How do you spell 'necessary'?", "It is spelled n-e-c-e-s-s-a-r-y: one c and two s."),
    ("I like long walks.", "Walks are a fine way to spend an afternoon. Do you have a favourite path?"),
    ("What does a baker do?", "A baker makes bread, rolls and cakes, often very early in the morning."),
    ("Tell me a colour.", "Blue."),
    ("How far is the Moon?", "On average the Moon is about 384,000 kilometres away from the Earth."),
)

Dress = Callable[[Prompt, Random], Prompt]


def around(words: str) -> Callable[[Prompt], Prompt]:
    """words: with {} where the prompt's own text goes"""
    return lambda p: replace(p, text=words.replace("{}", p.text))


def behind(system: str) -> Callable[[Prompt], Prompt]:
    return lambda p: replace(p, system=system)


def after(*exchanges: tuple[str, str]) -> Callable[[Prompt], Prompt]:
    """exchanges: what the user said and the assistant answered, before whatever the prompt's own conversation holds"""
    turns = tuple(Turn(role, said) for pair in exchanges for role, said in zip(Role, pair, strict=True))
    return lambda p: replace(p, history=(*turns, *p.history))


def lower_case(prompt: Prompt) -> Prompt:
    return replace(prompt, text=prompt.text.lower().rstrip("?.! "))


def capitals(prompt: Prompt) -> Prompt:
    return replace(prompt, text=prompt.text.upper())


def courtesies(prompt: Prompt, drawn: Random) -> Prompt:
    first, last = drawn.choice(OPENINGS), drawn.choice(CLOSINGS)
    return around(drawn.choice((f"{first} {{}}", f"{{}} {last}", f"{first} {{}} {last}")))(prompt)


def small_talk(prompt: Prompt, drawn: Random) -> Prompt:
    said = drawn.sample(SMALL_TALK, 4)
    said.insert(drawn.randrange(1, 5), "{}")
    return around(" ".join(said))(prompt)


def system_prompt(prompt: Prompt, drawn: Random) -> Prompt:
    parts = [drawn.choice(ROLES), *drawn.sample(MANNERS, drawn.randrange(3)), drawn.choice(CIRCUMSTANCES)]
    return behind(" ".join(filter(None, parts)))(prompt)


def earlier_turns(prompt: Prompt, drawn: Random) -> Prompt:
    return after(*drawn.sample(EXCHANGES, drawn.randrange(1, 4)))(prompt)


WARDROBE: Mapping[str, Dress] = {
    "lower case": lambda p, _: lower_case(p),
    "capitals": lambda p, _: capitals(p),
    "courtesies": courtesies,
    "small talk around": small_talk,
    "a system prompt": system_prompt,
    "earlier turns": earlier_turns,
}


def dressed(prompts: Sequence[Prompt], copies: int, seed: int, kinds: Sequence[str] = tuple(WARDROBE)) -> list[Prompt]:
    """`copies` further prompts for each, of its bucket and group, in clothes of as many kinds; the same for the same seed
    and id, whatever stands beside. raises ValueError for more copies than kinds"""
    if copies > len(kinds):
        raise ValueError(f"{copies} copies of a prompt are more than the {len(kinds)} kinds of clothes: {', '.join(kinds)}.")
    found = []
    for prompt in prompts:
        drawn = Random(f"{seed}/{prompt.id}")
        for kind in drawn.sample(list(kinds), copies):
            found.append(replace(WARDROBE[kind](prompt, drawn), id=f"{prompt.id} ({kind})"))
    return found
