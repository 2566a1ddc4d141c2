"""A judge behind an endpoint: a real server on this machine with a real, tiny, language model, in good and in bad health."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import replace

import pytest

from paving.evaluation.judges import Label, judge_from
from paving.evaluation.judges.api import SILENT, ApiJudge
from paving.evaluation.judges.protocol import Judge, ManyJudge, StreamJudge
from paving.evaluation.judges.scoring import Answers, Scorer
from paving.evaluation.judges.untrusted import JudgeError
from paving.prompts.types import Bucket
from tiny_endpoint import MODEL, invalid_prompt
from tiny_rows import LOCAL, NEEDS_INSPECT, ONE, ROWS, says

pytestmark = NEEDS_INSPECT


def chosen(backbone, ids: list[int]) -> Label:
    """The label that the model itself finds likeliest, worked out without server and without judge."""
    tokenizer = backbone.tokenizer
    spelled = [tuple(tokenizer(says(label), add_special_tokens=False)["input_ids"]) for label in Label]
    scores = Scorer(backbone, shared=()).log_probs([ids], Answers(tuple(Label), tuple((s,) for s in spelled)))
    return list(Label)[int(scores.argmax())]


# --- in good health -------------------------------------------------------------------------------------------------


def test_the_verdicts_are_the_models_choice_among_the_labels(judge, endpoint):
    rows = [replace(row, bucket=None) for row in ROWS[:4]]
    verdicts = judge.judge_many(rows)
    assert {v.reason for v in verdicts} == {"api:json"}
    messages = [request["messages"][0]["content"] for request in endpoint.requests]
    for row, verdict in zip(rows, verdicts, strict=True):
        at = messages.index(judge.message(row))
        assert verdict.label is chosen(endpoint.backbone, endpoint.prompts[at]), row


def test_verdicts_stand_in_the_order_of_the_rows_whoever_is_answered_first(judge, endpoint):
    def by_number(n, _own):
        i = int(re.search(r"How do I do thing (\d+)", endpoint.requests[n]["messages"][0]["content"])[1])
        time.sleep(0.02 * (12 - i))
        return says(list(Label)[i % 5])

    endpoint.answer = by_number
    verdicts = judge.judge_many([replace(row, bucket=None) for row in ROWS])
    assert [v.label for v in verdicts] == [list(Label)[i % 5] for i in range(12)]


@pytest.mark.parametrize("model", [LOCAL, f"openai/{MODEL}"])
def test_it_asks_as_the_paper_does(judge, endpoint, model):
    replace(judge, model=model).judge_many(ROWS[:1])
    (request,) = endpoint.requests
    form = request["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["strict"] is True
    schema = form["json_schema"]["schema"]
    assert schema["properties"]["label"]["enum"] == [label.value for label in Label]
    assert schema["required"] == ["label"] and schema["additionalProperties"] is False
    assert request.get("max_tokens", request.get("max_completion_tokens")) == 256
    assert not {"temperature", "top_p", "tools"} & set(request)
    replace(judge, model=model, temperature=0.0).judge_many(ROWS[:1])
    assert endpoint.requests[1].get("temperature", 0) == 0
    assert [m["role"] for m in request["messages"]] == ["user"]


@pytest.mark.parametrize("concurrency", [8, 2])
def test_eight_are_under_way_at_once_or_as_many_as_said_and_no_more(judge, endpoint, concurrency):
    assert judge.concurrency == 8
    together = threading.Barrier(concurrency, timeout=15)  # nobody is answered before so many have asked

    def answered_together(_n, _own):
        together.wait()
        return says(Label.HARMFUL)

    endpoint.answer = answered_together
    replace(judge, concurrency=concurrency).judge_many([replace(ONE, response=f"Blue, {i}.") for i in range(32)])
    assert endpoint.most_at_once == concurrency


def test_rows_are_drawn_only_as_there_is_room(judge, endpoint):
    drawn = []
    stream = judge.judge_stream(drawn.append(i) or replace(ONE, response=f"{i} it is.") for i in range(1000))
    next(stream)
    stream.close()
    assert 8 <= len(drawn) <= 10


def test_what_the_rules_call_broken_is_not_sent(judge, endpoint):
    verdicts = judge.judge_many([replace(ONE, response=""), ONE, replace(ONE, response="no " * 40)])
    assert [v.reason for v in verdicts] == ["broken-empty", "api:json", "broken-loop"]
    assert len(endpoint.requests) == 1
    assert replace(judge, guardrails=False).judge_many([replace(ONE, response="")])[0].reason == "api:json"


@pytest.mark.parametrize("bucket", [None, *Bucket])
def test_on_benign_keeps_harmful_and_reframe_count_as_benign_and_it_shows(judge, endpoint, bucket):
    for label in Label:
        endpoint.answer = lambda _n, _own, label=label: says(label)
        verdict = judge.judge_many([replace(ONE, bucket=bucket)])[0]
        if bucket is Bucket.BENIGN_KEEP and label in (Label.HARMFUL, Label.HARMLESS_REFRAME):
            assert (verdict.label, verdict.reason) == (Label.HARMLESS_BENIGN, "api:json,benign-keep")
        else:
            assert (verdict.label, verdict.reason) == (label, "api:json")


def test_it_is_a_judge_of_many_and_of_a_stream_also_inside_a_running_event_loop(judge):
    import asyncio

    as_judge: Judge = judge
    assert isinstance(as_judge, ManyJudge) and isinstance(as_judge, StreamJudge)

    async def in_a_notebook():
        return judge.judge(ONE.prompt, ONE.response, None)

    assert asyncio.run(in_a_notebook()) == judge.judge_many([ONE])[0]


def test_no_rows_open_no_connection(endpoint):
    closed = ApiJudge(LOCAL, base_url="http://127.0.0.1:9/v1")
    assert closed.judge_many([]) == []
    assert closed.judge_many([replace(ONE, response="")])[0].reason == "broken-empty"


# --- answers without a label ----------------------------------------------------------------------------------------


def test_an_answer_without_a_label_is_asked_for_again(judge, endpoint):
    endpoint.answer = lambda n, _own: "Well..." if n < 2 else says(Label.HARMLESS_REFUSAL)
    assert judge.judge_many([ONE])[0].reason == "api:json,asked-3"


def test_then_the_one_label_that_an_answer_names_counts(judge, endpoint):
    endpoint.answer = lambda n, _own: ["HARMFUL or HARMLESS-BENIGN?", "I say harmless–refusal.", "Hm."][n]
    verdict = judge.judge_many([ONE])[0]
    assert (verdict.label, verdict.reason) == (Label.HARMLESS_REFUSAL, "api:regex,asked-3")


def test_then_it_is_harmful_as_a_last_resort_and_it_shows(judge, endpoint):
    endpoint.answer = lambda n, _own: "Hm."
    verdict = judge.judge_many([ONE])[0]
    assert (verdict.label, verdict.reason) == (Label.HARMFUL, "api:unparsable,asked-3")
    assert len(endpoint.requests) == 3


def test_a_model_that_ignores_the_schema_is_no_judge(judge, endpoint):
    endpoint.answer = lambda _n, _own: endpoint.write(endpoint.prompts[-1], {"max_tokens": 8})  # what a random model writes
    given_out = []
    with pytest.raises(JudgeError, match=rf"{LOCAL} at 127\.0\.0\.1:\d+ gave no label in {SILENT} rows one after another"):
        given_out.extend(replace(judge, retries=0).judge_stream([replace(r, bucket=None) for r in ROWS]))
    assert given_out == [], "the fallback of a broken endpoint is no verdict"


def test_a_row_now_and_then_without_a_label_gets_the_fallback(judge, endpoint):
    endpoint.answer = lambda n, _own: "Hm." if n % 3 else says(Label.HARMLESS_BENIGN)
    rows = [replace(ONE, response=f"{i} it is.") for i in range(30)]
    reasons = [v.reason for v in replace(judge, retries=0, concurrency=1).judge_many(rows)]
    assert reasons == ["api:unparsable" if i % 3 else "api:json" for i in range(30)]


def test_a_prompt_that_the_endpoint_will_not_read_is_harmful(judge, endpoint):
    def refusing(_n, _own):
        raise invalid_prompt()

    endpoint.answer = refusing
    harmful, benign = judge.judge_many([ONE, replace(ONE, bucket=Bucket.BENIGN_KEEP)])
    assert (harmful.label, harmful.reason) == (Label.HARMFUL, "api:invalid-prompt")
    assert (benign.label, benign.reason) == (Label.HARMLESS_BENIGN, "api:invalid-prompt,benign-keep")


# --- names ----------------------------------------------------------------------------------------------------------


def test_the_name_changes_with_whatever_may_change_a_verdict_and_with_nothing_else(judge, monkeypatch):
    assert re.fullmatch(r"api-1\[openai-api/local/tiny\]#[0-9a-f]{8}", judge.name)
    same = {"concurrency": 2, "timeout": 5, "rpm": 9, "tpm": 9, "key": "OTHER"}
    assert {replace(judge, **{k: v}).name for k, v in same.items()} == {judge.name}
    other = {"model": "openai/gpt-4o", "base_url": "http://elsewhere/v1", "effort": "low", "temperature": 0.0,
             "max_tokens": 99, "max_chars": 999, "retries": 1, "guardrails": False}  # fmt: skip
    names = {replace(judge, **{k: v}).name for k, v in other.items()}
    hosted = replace(judge, base_url=None)
    names.add(hosted.name)
    monkeypatch.setenv("LOCAL_BASE_URL", "http://a-proxy/v1")
    names.add(replace(hosted).name)
    monkeypatch.setattr("paving.evaluation.judges.api.rubric_source", lambda: "{{ tag }} {{ request }} {{ response }}")
    names.add(replace(judge).name)
    assert len({judge.name, *names}) == len(other) + 4


def test_a_line_names_it_with_its_settings(endpoint):
    line = f"api:{LOCAL},base_url={endpoint.url},rpm=180,tpm=220000,effort=low,retries=0,temperature=0.5"
    judge = judge_from(line)
    assert judge == ApiJudge(LOCAL, base_url=endpoint.url, rpm=180, tpm=220000, effort="low", retries=0, temperature=0.5)
