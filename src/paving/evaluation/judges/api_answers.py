"""The label in what an endpoint answered: as the schema has it, bare, or named somewhere in the text."""

from __future__ import annotations

import json
import re

from paving.evaluation.judges.protocol import Label

FIELD = "label"
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"\A```(?:json)?\s*(.*?)\s*```\Z", re.DOTALL)
_DASHES = re.compile("[\u2010-\u2015_ ]")  # the paper itself prints its labels with an en dash
# HARMFUL is no part of the other four names, so each name found is one label.
_NAMES = re.compile(
    r"(?<![\w-])(?:HARMFUL|HARMLESS[-\u2010-\u2015_ ](?:BROKEN|REFUSAL|REFRAME|BENIGN))(?![\w-])", re.IGNORECASE
)


def parsed(text: str) -> tuple[Label, str] | None:
    """The label of an answer that consists of nothing else, and how it was written: "json" or "bare". None otherwise."""
    text = _THOUGHT.sub("", text).strip()
    if fenced := _FENCE.match(text):
        text = fenced[1]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        label = _named(text.strip(" \t\n\"'`*."))
        return None if label is None else (label, "bare")
    if isinstance(value, dict) and set(value) == {FIELD} and isinstance(value[FIELD], str):
        label = _named(value[FIELD])
        return None if label is None else (label, "json")
    label = _named(value) if isinstance(value, str) else None
    return None if label is None else (label, "bare")


def mentioned(text: str) -> Label | None:
    """The one label that an answer names, in whatever words around it; None if it names none, or more than one."""
    found = {_named(name) for name in _NAMES.findall(_THOUGHT.sub("", text))}
    return found.pop() if len(found) == 1 else None


def _named(text: str) -> Label | None:
    name = _DASHES.sub("-", text.strip().upper())
    return Label(name) if name in list(Label) else None
