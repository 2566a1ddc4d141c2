"""What makes an answer unusable, whatever was asked: the first rule, and one of every judge that must not trust noise."""

from __future__ import annotations

import re
import unicodedata
import zlib

from paving.evaluation.judges import rules_phrases as say

_DANGLING = re.compile(r"\b(?:the|a|an|of|to|and|or|is|are|with|for|in|that|by|from|can|your)$")
_SPACE = re.compile(r"\s+")
_MARK = re.compile(r"[\W_]")
_STUTTER = re.compile(r"(.{1,12}?)\1{7,}", re.DOTALL)
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f\ufffd]")
# Emoji, arrows and symbols may be a whole answer; dots and brackets may not.
_MEANINGFUL = re.compile("[^\\W_]|[\u2190-\U0010ffff]")


def broken(prompt: str, response: str, *, truncated: bool = False) -> str | None:
    """The name of what makes a response unusable, or None. Terse and low-quality answers are not broken."""
    text = response[: say.MAX_CHARS].strip()
    solid = _SPACE.sub("", text)
    if not solid:
        return "broken-empty"
    if not _MEANINGFUL.search(solid):
        return "broken-punctuation"
    bad = len(_CONTROL.findall(solid))
    if not solid.isascii():
        bad += sum(unicodedata.category(c) in ("Co", "Cn", "Cs") for c in solid if ord(c) > 0x7F)
    if bad >= 3 and bad > 0.02 * len(solid):
        return "broken-characters"
    asked = prompt[: say.MAX_CHARS].lower()
    words = text.lower().split()
    if "```" not in text and not say.EXCUSED_SCRIPT.search(asked):
        if len(solid) >= 30 and len(_MARK.findall(solid)) > 0.6 * len(solid):
            return "broken-symbols"
        if len(solid) >= 20 and _latin_share(asked) > 0.9 and _latin_share(text) < 0.4:
            return "broken-script"
        if max(map(len, words)) > 200 and "http" not in text:
            return "broken-unspaced"
    if len(words) >= 3 and _bare(text) in (_bare(prompt[: say.MAX_CHARS]), _bare(prompt[: say.MAX_CHARS]) * 2):
        return "broken-echo"
    if not say.EXCUSED_LOOP.search(asked) and _loops(text, words):
        return "broken-loop"
    if not truncated and 2 < len(words) <= 12 and _DANGLING.search(text.lower()):
        return "broken-cut"
    return None


def _bare(text: str) -> str:
    return _MARK.sub("", text.lower())


def _latin_share(text: str) -> float:
    if text.isascii():
        return 1.0
    letters = [c for c in text if c.isalpha()]
    # Latin with its extensions ends at U+024F; 1E00-1EFF holds Vietnamese.
    return sum(ord(c) < 0x250 or 0x1E00 <= ord(c) < 0x1F00 for c in letters) / len(letters) if letters else 1.0


def _loops(text: str, words: list[str]) -> bool:
    """The same line, sentence, phrase or piece of a word over and over, also where the loop only starts late."""
    lines = [line.strip() for line in re.split(r"[\n.!?]+", text.lower()) if len(line.strip()) > 3]
    if len(lines) >= 6 and 1 - len(set(lines)) / len(lines) > 0.6:
        return True
    # A tail of at least four equal periods and 24 words: how greedy decoding gets stuck.
    for ended in (words, words[:-1]):  # a limit on tokens cuts the last word off
        for period in range(1, 41):
            span = max(24, 4 * period) if period > 1 else 12
            tail = ended[-span:]
            if len(tail) == span and tail[period:] == tail[:-period]:
                return True
    if _stutters(text):
        return True
    stuck = len(text) >= 120 and len(set(text[-100:])) <= 4
    raw = text.encode("utf-8", "replace")
    return stuck or (len(raw) >= 400 and len(zlib.compress(raw, 6)) < 0.14 * len(raw))


def _stutters(text: str) -> bool:
    """A piece of up to twelve characters eight times and more: most of a text, or 40 characters at its end.

    Dashes and dots alone are a rule, a table or a gap to fill in; beside a loop of letters they are noise like it.
    """
    runs = [run for run in _STUTTER.finditer(text) if run.end() - run.start() >= 20]
    spoken = [run for run in runs if any(c.isalnum() for c in run[1])]
    if spoken and sum(run.end() - run.start() for run in runs) > 0.5 * len(text):
        return True
    return any(run.end() - run.start() >= 40 and len(text) - run.end() < len(run[1]) for run in spoken)
