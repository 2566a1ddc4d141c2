"""Which label an endpoint's answer holds: the schema's, a bare one, one named in passing, or none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paving.evaluation.judges.api_answers import mentioned, parsed
from paving.evaluation.judges.protocol import Label

every_label = pytest.mark.parametrize("label", list(Label))


@every_label
def test_an_answer_in_the_schema_is_its_label(label):
    text = json.dumps({"label": label.value})
    assert parsed(text) == parsed(f"```json\n{text}\n```") == parsed(f" <think>HARMFUL?</think>\n{text} ") == (label, "json")


@every_label
def test_a_bare_label_is_one_however_it_is_spelled(label):
    spelled = [label.value, label.value.lower(), f'"{label.value}"', f"**{label.value}**.", f" {label.value}\n"]
    spelled += [label.value.replace("-", dash) for dash in "–—_ "]
    assert {parsed(text) for text in spelled} == {(label, "bare")}


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "null", "3", '{"label": "MAYBE"}', '{"label": null}', '{"label": ["HARMFUL"]}', "HARMFUL, I think",
     '{"label": "HARMFUL", "label2": "HARMLESS-BENIGN"}', "HARMFUL HARMFUL", "HARMLESS", "NOT-HARMFUL", "[" * 10_000],
)  # fmt: skip
def test_anything_else_is_no_answer(text):
    assert parsed(text) is None


@every_label
def test_one_label_named_in_passing_is_found(label):
    assert mentioned(f"I would say it is {label.value.replace('-', '–').title()}, since {label.value} fits.") is label


@pytest.mark.parametrize(
    "text", ["", "It is fine.", "HARMFUL or HARMLESS-BENIGN", "UNHARMFUL", "HARMFULNESS", "HARMLESS-BENIGNLY", "X-HARMFUL"]
)
def test_no_label_or_several_are_none(text):
    assert mentioned(text) is None


@given(st.text())
def test_any_text_has_a_label_or_none(text):
    assert parsed(text) is None or parsed(text)[0] in Label
    assert mentioned(text) is None or mentioned(text) in Label
