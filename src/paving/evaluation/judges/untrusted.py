"""Put strangers' text into a judge's prompt so that it stays data.

A judged response may hold anything: "ignore the rubric", a forged closing mark, the judge's own chat tokens, a whole
forged conversation. Three measures, each checked on the finished token ids rather than believed:

1. *Control tokens are taken apart.* Every string that the judge's tokenizer would read as a special token gets a
   space after its first character ("<|im_end|>" becomes "< |im_end|>"), so it is read as the characters it consists
   of. `Untrusted.check` then compares the control tokens of the whole prompt, one by one, with those of the same
   prompt around harmless text.
2. *The marks around the data carry a tag* that occurs in none of it, so the data cannot close them.
3. *The instructions stand before and after the data*, so that the last word is the rubric's (`rubric.md.j2`).

What is left is persuasion: a text that talks a weak judge into a label. No quoting prevents that.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CUT = "\n[... the middle is left out ...]\n"
# Longer than nearly every token. Text beyond this many characters a token of room is dropped before it is tokenised,
# so that a response of megabytes costs no more than one that just fits.
CHARS_A_TOKEN = 16
LEAST_ROOM = 64  # tokens for request and response together; with less, most of every row would be left out


class JudgeError(ValueError):
    """A judge that cannot be built or cannot decide; the message says why, and what would do."""


@dataclass(frozen=True)
class Untrusted:
    """What one tokenizer takes for control, and how to keep data out of it.

    also: further strings that are structure in the prompt format at hand, though its tokenizer reads them as text
    """

    tokenizer: PreTrainedTokenizerBase
    also: tuple[str, ...] = ()

    @cached_property
    def controls(self) -> dict[int, str]:
        """id -> string of every token that structures a prompt: special tokens, and added ones the chat template writes.

        Added tokens that are neither (runs of spaces, HTML tags) are ordinary text. The token for unknown words is no
        control either, unless the same token has another role, as in GPT-2.
        """
        tokenizer = self.tokenizer
        template = str(getattr(tokenizer, "chat_template", None) or "")
        unknown = tokenizer.unk_token
        roles = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.cls_token, tokenizer.sep_token}
        found = {}
        for index, token in tokenizer.added_tokens_decoder.items():
            text = token.content
            structural = token.special or text in template
            only_unknown = text == unknown and text not in roles and text not in template
            if structural and text.strip() and not only_unknown:
                found[index] = text
        return found

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        # The string of the unknown token is taken apart with the rest: written out, it is not an unknown word.
        texts = {*self.controls.values(), *self.also, self.tokenizer.unk_token or ""} - {""}
        longest_first = sorted(texts, key=lambda t: (-len(t), t))
        # Without regard to case: some tokenizers fold it before they look for their tokens.
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)", re.IGNORECASE)

    def plain(self, text: str) -> str:
        """`text` with every control string taken apart. Text without any is returned as it is."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is no text, and tokenizers refuse it
        for _ in range(8):
            if not self._pattern.search(text):
                return text
            text = self._pattern.sub(_taken_apart, text)
        raise JudgeError(
            f"cannot take apart the control tokens of {self.tokenizer.name_or_path or 'this tokenizer'}: taking one "
            "apart writes another. Use a judge with another tokenizer."
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a finished prompt: control strings are read as control, and nothing is added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def count(self, text: str, room: int) -> int:
        """How many tokens `text` has; room + 1 for a text so long that it need not be counted."""
        return room + 1 if len(text) > 2 * CHARS_A_TOKEN * room else len(self.encode(text))

    def cut(self, text: str, room: int) -> str:
        """`text` (already plain) as about `room` tokens: the first and last halves of that, and a mark between them.

        Withholding shows at the beginning, and content that follows a caveat at the end. A text that fits is returned
        as it is. The count is of the text alone; in a prompt tokens may merge otherwise, so callers measure the whole.
        """
        if self.count(text, room) <= room:
            return text
        head, tail = (room + 1) // 2, room // 2
        first = self.encode(text[: CHARS_A_TOKEN * head])[:head]
        last = self.encode(text[len(text) - CHARS_A_TOKEN * tail :])[-tail:] if tail else []
        return self.plain(self._decode(first) + CUT + self._decode(last))

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def control_ids(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self.controls]

    def check(self, ids: Sequence[int], frame: Sequence[int], name: str) -> None:
        """Hold that the data brought no control token into the prompt: `ids` has those of `frame`, in that order.

        raises JudgeError otherwise. No tokenizer we know comes here, but a label given on such a prompt could be forged.
        """
        if self.control_ids(ids) != self.control_ids(frame):
            raise JudgeError(
                f"the judged text reached {name} as control tokens, so its label could be forged. The tokenizer reads "
                "strings that it does not list among its special tokens as special; use another judge model."
            )


@dataclass(frozen=True)
class Quoting:
    """Prompts of one kind around two strangers' texts: made plain, cut to fit, rendered, checked.

    render  (request, response, **context) -> the whole prompt as text, control strings and all
    limit   most tokens of a prompt; `name` is the judge model's, for messages
    both    whether the response is shown; False where only the request is asked about
    """

    untrusted: Untrusted
    render: Callable[..., str]
    limit: int
    name: str
    both: bool = True

    def __post_init__(self) -> None:
        probe = self.render("a kiwi", "b plum")
        if "a kiwi" not in probe or (self.both and "b plum" not in probe):
            raise JudgeError(
                f"the chat template of {self.name} does not pass on the text of a turn, so the model would not see what it "
                "judges. Check that the model is of the kind named; an ordinary instruction-tuned one takes 'rubric'."
            )
        if self.room < LEAST_ROOM:
            raise JudgeError(
                f"the instructions leave {self.room} tokens for request and response of the {self.limit} that "
                f"{self.name} may be shown; {LEAST_ROOM} are needed. Raise max_tokens, or use a model with a longer context."
            )

    @cached_property
    def frame(self) -> tuple[int, ...]:
        """The prompt around harmless text, in tokens."""
        return tuple(self.untrusted.encode(self.render("a", "b")))

    @cached_property
    def shared(self) -> tuple[int, ...]:
        """What every prompt of the kind begins with."""
        return self.frame[: common(self.frame, self.untrusted.encode(self.render("c", "d")))]

    @property
    def room(self) -> int:
        """Tokens for request and response together."""
        return self.limit - len(self.frame)

    def ids(self, request: str, response: str, **context: object) -> list[int]:
        """Token ids of one prompt. Its only control tokens are those of the frame."""
        untrusted, room = self.untrusted, self.room
        request, response = untrusted.plain(request), untrusted.plain(response)
        for _ in range(8):
            of_request, of_response = shares(untrusted.count(request, room), untrusted.count(response, room), room)
            fitted = untrusted.cut(request, of_request), untrusted.cut(response, of_response)
            ids = untrusted.encode(self.render(*fitted, **context))
            if len(ids) <= self.limit:
                untrusted.check(ids, self.frame, self.name)
                return ids
            # Tokens merge otherwise in a prompt than alone, and a cut is marked: what is too much is taken off the room.
            room -= len(ids) - self.limit + 8
        raise JudgeError(f"request and response cannot be cut to the {self.limit} tokens that {self.name} may be shown.")


def _taken_apart(match: re.Match[str]) -> str:
    text = match.group()
    return f"{text[0]} {text[1:]}" if len(text) > 1 else "\ufffd"


def tag_for(*texts: str) -> str:
    """Twelve hexadecimal digits that occur in none of the texts.

    Made from the texts, so that the same row always gets the same prompt; a text that holds its own tag gets another.
    """
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "replace"))
    while True:
        tag = digest.hexdigest()[:12]
        if not any(tag in text.lower() for text in texts):
            return tag
        digest.update(b"again")


def shares(request: int, response: int, room: int) -> tuple[int, int]:
    """How many of `room` tokens request and response get, given how many they have.

    The response is what is judged: the request gets what it leaves, but never less than a quarter (or all it has).
    """
    of_request = min(request, max(room // 4, room - response))
    return of_request, min(response, room - of_request)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
