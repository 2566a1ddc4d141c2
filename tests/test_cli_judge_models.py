"""`paving judge` with models: local ones and endpoints, what is kept when one fails, and the Inspect log."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import threading
from pathlib import Path

import pytest

from command_line import paving, printed, refused
from tiny_endpoint import MODEL, Endpoint, Fault, quota_used_up, serving
from tiny_judges import judge_backbone, tiny_classifier

needs_inspect = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("inspect_ai", "openai")),
    reason="inspect-ai and openai are not installed: make test installs them",
)
N, GOOD = 14, 6  # rows of the file; requests that go well before a fault


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def answers(tmp_path) -> Path:
    path = tmp_path / "answers.jsonl"
    rows = [{"id": f"q{i}", "prompt": f"How do I do {i}?", "response": f"You do it in {i} steps."} for i in range(N)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def backbone():
    return judge_backbone()


@pytest.fixture
def endpoint(backbone):
    with serving(Endpoint(backbone)) as running:
        yield running


def line(endpoint: Endpoint, **options) -> str:
    return ",".join([f"api:openai-api/local/{MODEL}", f"base_url={endpoint.url}", *(f"{k}={v}" for k, v in options.items())])


# --- local models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory, backbone):
    folder = tmp_path_factory.mktemp("models")
    classifier = tiny_classifier()
    for name, thing in (("chat", backbone), ("classifier", classifier)):
        thing.model.save_pretrained(folder / name)
        thing.tokenizer.save_pretrained(folder / name)
    return folder


def test_a_rubric_judge_and_a_classifier_judge_a_file(answers, saved, tmp_path):
    text = printed(
        "judge", answers, "--out", tmp_path / "r.jsonl", "--judge", f"hf:rubric={saved}/chat",
        "--device", "cpu", "--dtype", "float32", "--batch-size", "4",
    )  # fmt: skip
    assert "judge rubric-1[chat@" in text and f"({N} judged now, 0 known before)" in text
    assert all(v["reason"].startswith("rubric:") for v in lines(tmp_path / "r.jsonl"))
    classifier = f"hf:classifier={saved}/classifier,refusal=REJECTION,other=NORMAL"
    printed("judge", answers, "--out", tmp_path / "c.jsonl", "--judge", classifier, "--device", "cpu")
    assert {v["reason"].split(":")[0] for v in lines(tmp_path / "c.jsonl")} <= {"classifier", "bucket-benign"}


def test_the_dtype_reaches_the_model(answers, saved, tmp_path):
    judge = ["--judge", f"hf:rubric={saved}/chat", "--device", "cpu", "--dtype"]
    printed("judge", answers, "--out", tmp_path / "r.jsonl", *judge, "bfloat16")
    assert "/bfloat16]" in lines(tmp_path / "r.jsonl")[0]["judge"]
    assert "float99" in refused("judge", answers, "--out", tmp_path / "x.jsonl", *judge, "float99")


def test_a_model_that_is_not_there_is_one_line(answers, tmp_path):
    judge = f"hf:rubric={tmp_path}/nothing"
    assert "nothing" in refused("judge", answers, "--out", tmp_path / "v.jsonl", "--judge", judge)
    assert not (tmp_path / "v.jsonl.partial").exists()


# --- endpoints ------------------------------------------------------------------------------------------------------


@needs_inspect
def test_an_endpoint_judges_a_file_and_the_second_run_needs_neither_it_nor_a_key(answers, endpoint, tmp_path, monkeypatch):
    endpoint.key = "k"
    monkeypatch.setenv("THE_KEY", "k")
    command = ("judge", answers, "--out", tmp_path / "v.jsonl", "--judge", line(endpoint, key="THE_KEY"))
    assert f"({N} judged now, 0 known before)" in printed(*command)
    found = lines(tmp_path / "v.jsonl")
    assert [v["id"] for v in found] == [f"q{i}" for i in range(N)] and {v["reason"] for v in found} == {"api:json"}
    asked = len(endpoint.requests)
    monkeypatch.delenv("THE_KEY")
    assert f"(0 judged now, {N} known before)" in printed(*command)
    assert len(endpoint.requests) == asked == N


def _quota(endpoint: Endpoint, n: int, own) -> str:
    if n >= GOOD:
        raise quota_used_up()
    return own()


def _hangs(endpoint: Endpoint, n: int, own) -> str:
    if n >= GOOD:
        endpoint.release.wait(60)
    return '{"label": "HARMLESS-BENIGN"}'  # at once: the model itself may take a second on a busy machine


def _nonsense(endpoint: Endpoint, n: int, own) -> str:
    return own() if n < GOOD else "Colourless green ideas."


def _refuses(endpoint: Endpoint, n: int, own) -> str:
    if n >= GOOD:
        raise Fault(403, "forbidden", "not for you")
    return own()


@needs_inspect
@pytest.mark.parametrize(
    ("fault", "says", "options"),
    [
        (_quota, "quota", {}),
        (_hangs, "did not answer within 2 s", {"timeout": 2, "concurrency": 2}),
        (_nonsense, "gave no label in 8 rows", {"concurrency": 1}),  # else some answers are overtaken
        (_refuses, "403", {}),
    ],
)
def test_what_was_judged_before_an_endpoint_fails_is_kept_and_the_next_run_goes_on(
    answers, endpoint, tmp_path, fault, says, options
):
    endpoint.answer = lambda n, own: fault(endpoint, n, own)
    command = ("judge", answers, "--out", tmp_path / "v.jsonl", "--judge", line(endpoint, retries=0, **options))
    message = refused(*command)
    assert says in message and "How do I do" not in message and re.search(r"answers\.jsonl:\d+", message)
    assert "v.jsonl.partial, and the same command goes on from there" in message
    assert not (tmp_path / "v.jsonl").exists()
    kept = lines(tmp_path / "v.jsonl.partial")
    assert len(kept) == GOOD and {v["reason"] for v in kept} == {"api:json"}
    endpoint.release.set()
    endpoint.answer = lambda _n, own: own()
    assert f"({N - GOOD} judged now, {GOOD} known before)" in printed(*command)
    assert [v["id"] for v in lines(tmp_path / "v.jsonl")] == [f"q{i}" for i in range(N)]


@needs_inspect
def test_nobody_listening_keeps_the_file_as_it_was_and_says_so(answers, endpoint, tmp_path):
    command = ("judge", answers, "--out", tmp_path / "v.jsonl", "--judge", line(endpoint, retries=0))
    printed(*command)
    with serving(Endpoint(endpoint.backbone)) as gone:
        other = line(gone, retries=0)
    assert "cannot reach openai-api/local/tiny" in refused(*command[:3], tmp_path / "w.jsonl", "--judge", other)


@pytest.fixture
def ctrl_c():
    """Started in the background of a shell, Python finds SIGINT ignored, and a test of Ctrl-C would wait for ever."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@needs_inspect
def test_ctrl_c_at_an_endpoint_that_hangs_keeps_what_it_judged(answers, endpoint, tmp_path, ctrl_c):
    def hanging(n, own):
        if n == N - 1:  # all that may be under way are
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        return _hangs(endpoint, n, own)

    endpoint.answer = hanging
    result = paving("judge", answers, "--out", tmp_path / "v.jsonl", "--judge", line(endpoint))
    assert result.exit_code == 130 and "the same command goes on from there" in result.stderr
    assert len(lines(tmp_path / "v.jsonl.partial")) == GOOD and not (tmp_path / "v.jsonl").exists()


@needs_inspect
def test_no_key_is_one_line(answers, tmp_path):
    message = refused("judge", answers, "--out", tmp_path / "v.jsonl", "--judge", "api:openai/gpt-4o-mini")
    assert "OPENAI_API_KEY" in message


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        ("api:gpt-4o", "names no provider. Write api:PROVIDER/MODEL"),
        ("api:openai/m,speed=9", "api has no option speed; allowed: base_url, key"),
        ("api:openai/m,rpm=many", "rpm is 'many'; a whole number"),
        ("api:openai/m,rpm=0", "rpm is 0; at least 1"),
        ("api:openai/m,temperature=warm", "temperature is 'warm'; a number such as"),
        ("oracle", "allowed: rules, rules:edit=harmful, hf:rubric=MODEL"),
    ],
)
def test_a_judge_that_cannot_be_is_refused_before_anything_is_read(answers, tmp_path, judge, says):
    assert says in refused("judge", answers, "--out", tmp_path / "v.jsonl", "--judge", judge)
    assert [p.name for p in tmp_path.iterdir()] == [answers.name]


def test_without_the_extra_it_says_what_to_install(answers, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "inspect_ai" else find_spec(name, *a))
    out = ("judge", answers, "--out", tmp_path / "v.jsonl")
    assert "pip install 'paving[api]'" in refused(*out, "--judge", "api:openai/m")
    assert "pip install 'paving[api]'" in refused(*out, "--inspect-log", tmp_path / "l.eval")
    assert not (tmp_path / "v.jsonl").exists()


# --- the Inspect log ------------------------------------------------------------------------------------------------


@needs_inspect
def test_a_log_is_written_beside_the_verdicts_and_can_be_added_later(answers, tmp_path):
    from inspect_ai.log import read_eval_log

    command = ("judge", answers, "--out", tmp_path / "v.jsonl")
    printed(*command)
    log = tmp_path / "logs" / "l.eval"
    text = printed(*command, "--inspect-log", log)
    assert f"(0 judged now, {N} known before)" in text and f"Inspect log: {log} (HARMFUL responses left out)" in text
    assert {s.id for s in read_eval_log(str(log)).samples} == {f"q{i}" for i in range(N)}
    found = json.loads(printed(*command, "--inspect-log", log, "--log-harmful-texts", "--json"))
    assert found["inspect_log"] == str(log) and read_eval_log(str(log)).eval.metadata["harmful_texts"] is True


@needs_inspect
def test_a_log_that_cannot_be_written_is_said_before_anything_is_judged(answers, tmp_path):
    command = ("judge", answers, "--out", tmp_path / "v.jsonl")
    assert "must end in .eval or .json" in refused(*command, "--inspect-log", tmp_path / "l.txt")
    assert "Give --inspect-log" in refused(*command, "--log-harmful-texts")
    assert not (tmp_path / "v.jsonl").exists()
