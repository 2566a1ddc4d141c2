"""A judge behind an endpoint in bad health: busy, hanging, gone, out of quota, with a wrong model or key."""

from __future__ import annotations

import socket
import time
from dataclasses import replace

import pytest

from paving.evaluation.judges import Label
from paving.evaluation.judges.api import ApiJudge
from paving.evaluation.judges.api_errors import Retries
from paving.evaluation.judges.untrusted import JudgeError
from tiny_endpoint import MODEL, Endpoint, Fault, quota_used_up, serving, too_many_requests
from tiny_rows import LOCAL, NEEDS_INSPECT, ONE, ROWS, says

pytestmark = NEEDS_INSPECT


def test_too_many_requests_are_sent_again(judge, endpoint, waited):
    def busy(n, own):
        if n in (0, 1):
            raise too_many_requests()
        return own()

    endpoint.answer = busy
    verdicts = replace(judge, concurrency=1).judge_many(ROWS[:2])
    assert [v.reason.split(",")[0] for v in verdicts] == ["api:json"] * 2 and len(endpoint.requests) == 4
    assert len(waited) == 2 and waited[1] > waited[0] >= 3, "pauses grow"


def test_after_eight_retries_it_gives_up(judge, endpoint, waited):
    def busy(_n, _own):
        raise too_many_requests()

    endpoint.answer = busy
    _, message = failing(ApiJudge(LOCAL, base_url=judge.base_url), ROWS[:1])
    assert len(endpoint.requests) == 9 and "still has too many requests (429)" in message


def failing(judge: ApiJudge, rows=ROWS) -> tuple[dict, str]:
    """(what was given out before it failed, the message)"""
    found = {}
    with pytest.raises(JudgeError) as caught:
        for i, verdict in judge.judge_stream(rows):
            found[i] = verdict
    assert "\n" not in str(caught.value)
    return found, str(caught.value)


@pytest.mark.parametrize("model", [LOCAL, f"openai/{MODEL}"])
def test_a_quota_that_ends_half_way_ends_it_at_once_and_what_was_paid_for_is_given_out(judge, endpoint, model, waited):
    def paid(n, own):
        if n >= 5:
            raise quota_used_up()
        time.sleep(0.3)  # still under way while the others are refused
        return own()

    endpoint.answer = paid
    found, message = failing(replace(judge, model=model, retries=8), ROWS * 3)
    assert len(found) == 5 and len(endpoint.requests) <= 5 + judge.concurrency, "no more than were under way by then"
    assert "quota" in message and "429" in message
    assert waited == [], "a quota does not come back by asking again"


def test_an_endpoint_that_hangs_is_left_after_the_timeout(judge, endpoint):
    def hanging(n, _own):
        if n >= 3:
            endpoint.release.wait(60)
        return says(Label.HARMLESS_BENIGN)  # at once: the model itself may take a second on a busy machine

    endpoint.answer = hanging
    found, message = failing(replace(judge, timeout=2, retries=0))
    assert len(found) == 3
    assert "did not answer within 2 s" in message and "timeout=" in message


def test_ctrl_c_gives_up_what_hangs(judge, endpoint):
    endpoint.answer = lambda n, own: own() if n == 0 else endpoint.release.wait(60) and own()
    stream = judge.judge_stream(ROWS)
    assert next(stream)[1].reason.startswith("api:json")
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt())
    assert time.monotonic() - start < 30, "not the minute that the endpoint takes"


def test_nobody_listening_is_one_line_at_once(judge, waited):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    _, message = failing(replace(judge, base_url=f"http://127.0.0.1:{port}/v1", retries=8))
    assert f"cannot reach {LOCAL} at 127.0.0.1:{port}" in message
    assert waited == [], "asking again brings up no server"


def gone(_n, _own):
    raise ConnectionResetError("the connection that is still open breaks")


def test_an_endpoint_that_goes_down_is_asked_again(backbone, waited):
    with serving(Endpoint(backbone)) as endpoint:
        stream = ApiJudge(LOCAL, base_url=endpoint.url, timeout=20, retries=2, concurrency=1).judge_stream(ROWS)
        assert next(stream)[1].reason.startswith("api:")
        endpoint.answer = gone
    with pytest.raises(JudgeError):
        list(stream)
    assert len(waited) >= 2


class ConnectError(Exception):
    """Named as the HTTP client's."""


def test_only_connections_that_were_never_made_are_not_made_again():
    def behind(cause):
        error = RuntimeError("connection error")
        error.__cause__ = cause
        return error

    for cause in (ConnectError(), ConnectionRefusedError(), socket.gaierror()):
        assert not Retries(lambda e: True)(behind(cause))
        assert Retries(lambda e: True, reached=True)(behind(cause))
    for other in (behind(None), behind(ConnectionResetError()), TimeoutError()):
        assert Retries(lambda e: True)(other) and not Retries(lambda e: False)(other)
    retries, busy = Retries(lambda e: True), RuntimeError("too many requests")
    busy.status_code = 429
    assert retries(busy) and retries(behind(ConnectError())), "it has answered: with 429"


def test_a_wrong_model_is_one_line_that_names_it(judge, endpoint):
    _, message = failing(replace(judge, model="openai-api/local/huge"))
    assert "no openai-api/local/huge at 127.0.0.1" in message and "is known there (404)" in message


def test_a_wrong_or_missing_key_is_one_line_without_the_key(judge, endpoint, monkeypatch):
    endpoint.key = "the-right-one"
    secret = "sk-very-secret-0123456789"
    _, message = failing(judge)
    assert "refuses the key" in message and "401" in message and "key=VARIABLE" in message
    monkeypatch.setenv("SOME_KEY", secret)
    _, message = failing(replace(judge, key="SOME_KEY"))
    assert "SOME_KEY" in message and secret not in message
    monkeypatch.setenv("SOME_KEY", endpoint.key)
    keyed = replace(judge, key="SOME_KEY")
    assert keyed.judge_many([ONE])[0].reason == "api:json"
    assert endpoint.key not in keyed.name + repr(keyed)
    monkeypatch.delenv("SOME_KEY")
    assert "the environment has no SOME_KEY" in failing(keyed)[1]


@pytest.mark.parametrize("variable", ["MY_OWN", "OTHER_API_KEY"])
def test_an_endpoints_message_that_holds_a_key_is_passed_on_without_it(judge, endpoint, monkeypatch, variable):
    def chatty(_n, _own):
        raise Fault(400, "bad", f"do not like {'secret-' * 3} " + "at all " * 100)

    endpoint.answer = chatty
    monkeypatch.setenv(variable, "secret-" * 3)
    _, message = failing(replace(judge, key="MY_OWN" if variable == "MY_OWN" else None))
    assert f"does not take the request (400): do not like [{variable}] at all" in message
    assert "secret" not in message and "You sort answers" not in message and len(message) < 350


def test_without_any_key_the_variable_that_is_missing_is_named():
    assert "OPENAI_API_KEY" in failing(ApiJudge("openai/gpt-4o-mini"))[1]
    assert "LOCAL_API_KEY" in failing(ApiJudge(LOCAL))[1]
    assert "nobody" in failing(ApiJudge("nobody/m"))[1]


def test_the_key_of_another_place_is_not_sent_to_an_address_in_the_line(judge, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    for model in (LOCAL, f"openai/{MODEL}", f"openai-api/openai/{MODEL}"):
        replace(judge, model=model).judge_many([ONE])
    assert len(endpoint.headers) == 3 and "sk-openai" not in str(endpoint.headers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "127.0.0.1:8000"}, "an address such as"),
        ({"base_url": "http://me:secret@host/v1"}, "key=VARIABLE"),
        ({"key": "K"}, "no base_url"),
        ({"concurrency": 0}, "at least 1"),
        ({"retries": -1}, "0 or more"),
        ({"temperature": 3.0}, "0 to 2"),
        ({"max_chars": 10}, "at least 400"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(options, message):
    with pytest.raises(JudgeError, match=message) as caught:
        ApiJudge("openai/m", **options)
    assert "secret" not in str(caught.value)


def test_requests_a_minute_are_kept_over_calls(judge, endpoint, monkeypatch):
    waits = []

    async def noted(seconds):
        waits.append(seconds)

    monkeypatch.setattr("paving.evaluation.judges.api.pause", noted)
    slow = replace(judge, rpm=2)
    for row in ROWS[:3]:
        slow.judge_many([row])
    assert waits[:2] == [0, 0] and 50 < waits[2] <= 60


def test_tokens_are_the_endpoints_own_count_once_it_has_answered(judge, endpoint):
    judge.judge_many([ONE])
    (booking,) = judge._pace._booked
    assert booking.tokens == len(endpoint.prompts[0]) + 8
