"""`paving serve`: vLLM's own HTTP server with a controller in it, policies by request, errors that are the user's."""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these in an environment of its own")

from served_answers import EARLY, SHIPPED, TEXTS, TOKENS, controller_of, expected, gates_of

from paving.backbone import EMBEDDED, load_backbone, render_ids
from paving.controller import save_controller

REQUESTS = 200
POLICIES = (None, "default", "closed", "soft")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def post(port: int, where: str, policy: object = None, **body: object) -> str:
    body = {"model": "base", "temperature": 0, **body}
    if policy is not None:
        body["vllm_xargs"] = {"paving_policy": policy}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/{where}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return response.read().decode()


def ask(port: int, prompt: list[int], policy: object, *, n: int = TOKENS) -> str:
    answer = json.loads(post(port, "completions", policy, prompt=prompt, max_tokens=n, ignore_eos=True))
    return answer["choices"][0]["text"]


def chunks(streamed: str) -> list[dict]:
    return [json.loads(line[6:]) for line in streamed.split("\n\n") if line.startswith("data: {")]


def counted(port: int, prefix: str = "paving:") -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines) if name.startswith(prefix)}


def running(port: int) -> float:
    return sum(v for k, v in counted(port, "vllm:num_requests_").items() if k.startswith("vllm:num_requests_running"))


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(EMBEDDED, dtype="float32")


@pytest.fixture(scope="module", params=[EARLY, SHIPPED], ids=["early", "as shipped"])
def controller(request, backbone):
    return controller_of(backbone, request.param)


@contextmanager
def server(start: list[str], controller, place: Path) -> Iterator[int]:
    """Its port, once it answers. Stopped as a service manager does, it must go in a minute and leave no process."""
    folder = save_controller(controller, place / "c")
    port = free_port()
    line = [sys.executable, *start, "serve", str(folder), "--port", str(port), "--", "--dtype", "float32"]
    line += ["--max-model-len", "256", "--max-num-seqs", "8", "--served-model-name", "base"]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log = (place / "server.log").open("w+")
    running = subprocess.Popen(line, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                assert running.poll() is None, log.seek(0) or log.read()[-3000:]
                time.sleep(1)
        else:
            pytest.fail("the server did not start in time")
        yield port
        assert running.poll() is None, "the server is gone"
    finally:
        running.terminate()
        running.wait(60)
        log.close()
    for _ in range(100):
        if not processes_of(running.pid):
            break
        time.sleep(0.1)
    assert processes_of(running.pid) == []


def processes_of(session: int) -> list[int]:
    """Those of a session that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state, _, _, of = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:4]
        except (OSError, IndexError, ValueError):
            continue
        if int(of) == session and state != "Z":
            found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def port(controller, tmp_path_factory):
    with server(["-m", "paving.cli"], controller, tmp_path_factory.mktemp("served")) as port:
        yield port


def test_concurrent_requests_of_all_policies_are_answered_as_each_alone(port, backbone, controller):
    prompts = [render_ids(backbone, text) for text in TEXTS]
    by = {policy: expected(backbone, controller, policy) for policy in ("hard", "closed", "soft")}
    rng = random.Random(0)
    asked = [(rng.randrange(len(TEXTS)), rng.choice(POLICIES)) for _ in range(REQUESTS)]
    with concurrent.futures.ThreadPoolExecutor(REQUESTS) as pool:
        answers = list(pool.map(lambda one: ask(port, prompts[one[0]], one[1]), asked))
    for (i, policy), answer in zip(asked, answers, strict=True):
        tokens = by[policy if policy in ("closed", "soft") else "hard"][i]
        assert answer == backbone.tokenizer.decode(tokens, skip_special_tokens=True), (TEXTS[i], policy)


@pytest.mark.parametrize("policy", ["oracle", "open", "often", "conformal:0.05"])
def test_a_policy_that_no_request_may_ask_for_is_http_400_and_the_server_goes_on(port, backbone, policy):
    prompt = render_ids(backbone, TEXTS[0])
    with pytest.raises(urllib.error.HTTPError) as told:
        ask(port, prompt, policy)
    assert told.value.code == 400
    text = told.value.read().decode()
    assert "a request may ask for" in text or "calibration logits" in text
    assert ask(port, prompt, "closed", n=2)


@pytest.mark.parametrize("where", ["completions", "chat/completions", "responses"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("asks", "said"),
    [
        ({"vllm_xargs": {"paving_policy": "often"}}, "a request may ask for"),
        ({"vllm_xargs": {"paving_polcy": "closed"}}, "paving_polcy: no argument of a request; there is paving_policy"),
        ({"paving_policy": "closed"}, "put paving_policy into vllm_xargs"),
    ],
    ids=["unknown policy", "misspelt", "in the wrong place"],
)
def test_what_is_asked_wrongly_is_http_400_at_every_door_also_of_a_stream(port, where, stream, asks, said):
    messages = [{"role": "user", "content": TEXTS[0]}]
    body = {
        "completions": {"prompt": TEXTS[0]},
        "chat/completions": {"messages": messages},
        "responses": {"input": TEXTS[0]},
    }
    limit = {"max_output_tokens": 4} if where == "responses" else {"max_tokens": 4}
    with pytest.raises(urllib.error.HTTPError) as told:
        post(port, where, stream=stream, **body[where], **limit, **asks)
    assert told.value.code == 400 and said in told.value.read().decode()


@pytest.mark.parametrize("text", range(len(TEXTS)))
def test_every_kind_of_answer_says_what_its_gate_did(port, backbone, controller, text):
    gate = gates_of(backbone, controller)[text]
    prompt, messages = render_ids(backbone, TEXTS[text]), [{"role": "user", "content": TEXTS[text]}]
    whole = json.loads(post(port, "completions", prompt=prompt, max_tokens=4))
    two = json.loads(post(port, "completions", prompt=[prompt, prompt], max_tokens=4))
    stopped = json.loads(post(port, "completions", prompt=prompt, max_tokens=20, stop=[" ", "e"], n=2, temperature=1))
    chat = json.loads(post(port, "chat/completions", messages=messages, max_tokens=4))
    response = json.loads(post(port, "responses", input=TEXTS[text], max_output_tokens=4))
    said = [whole["paving"], *two["paving"], stopped["paving"], chat["paving"], response["paving"]]
    for where, asked in (("completions", {"prompt": prompt}), ("chat/completions", {"messages": messages})):
        streamed = chunks(post(port, where, stream=True, max_tokens=4, **asked))
        assert [i for i, chunk in enumerate(streamed) if "paving" in chunk] == [0]
        said.append(streamed[0]["paving"])
    for told in said:
        assert told["policy"] == "hard" and told["gate"] == gate.gate and not told["failed"]
        assert told["logit"] == pytest.approx(gate.logit, abs=1e-3)
        assert told["mixture"] == pytest.approx(gate.mixture, abs=1e-4)
    assert all(answer.get("kv_transfer_params") is None for answer in (whole, two, stopped, chat, response))
    closed = json.loads(post(port, "chat/completions", "closed", messages=messages, max_tokens=2))["paving"]
    assert (closed["policy"], closed["gate"], closed["logit"]) == ("closed", 0.0, None)


def test_gates_are_counted_beside_vllms_own_metrics(port, backbone, controller):
    before = counted(port)
    for text, policy in ((0, None), (1, None), (2, "closed"), (3, "soft")):
        ask(port, render_ids(backbone, TEXTS[text]), policy, n=2)
    found = {name: value - before.get(name, 0) for name, value in counted(port).items()}
    is_open = sum(gate.gate > 0 for gate in gates_of(backbone, controller)[:2])
    assert found.get('paving:requests_total{gate="open",policy="hard"}', 0) == is_open
    assert found.get('paving:requests_total{gate="closed",policy="hard"}', 0) == 2 - is_open
    assert found['paving:requests_total{gate="closed",policy="closed"}'] == 1
    assert found['paving:requests_total{gate="open",policy="soft"}'] == 1
    assert found["paving:gate_count"] == found["paving:boundary_count"] == 3  # a closed gate is not decided
    assert found["paving:gate_failures_total"] == 0
    body = {"prompt": render_ids(backbone, TEXTS[0]), "max_tokens": 2, "n": 3, "temperature": 1}
    post(port, "completions", "soft", **body)
    several = {name: value - before.get(name, 0) for name, value in counted(port).items()}
    assert several['paving:requests_total{gate="open",policy="soft"}'] == 2  # three samples are one request


def test_clients_that_go_away_leave_the_others_answers_and_later_ones_as_they_are(port, backbone, controller):
    prompts = [render_ids(backbone, text) for text in TEXTS]
    by = {policy: expected(backbone, controller, policy) for policy in ("hard", "closed")}

    def leaves(i: int) -> None:
        body = {"model": "base", "prompt": prompts[i % len(TEXTS)], "max_tokens": 150, "ignore_eos": True, "stream": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            response.readline()  # and goes

    def stays(i: int) -> str:
        return ask(port, prompts[i % len(TEXTS)], ("closed", None)[i % 2])

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        gone = [pool.submit(leaves, i) for i in range(12)]
        answers = list(pool.map(stays, range(12)))
        for one in gone:
            one.result()
    for _ in range(60):
        if not running(port):
            break
        time.sleep(0.5)
    assert running(port) == 0
    for i, answer in enumerate([*answers, *map(stays, range(4))]):
        tokens = by[("closed", "hard")[i % 12 % 2]][i % 12 % len(TEXTS)]
        assert answer == backbone.tokenizer.decode(tokens, skip_special_tokens=True)


def test_an_exception_in_the_worker_fails_that_request_and_leaves_the_server_up(backbone, tmp_path):
    """faulty_server.py breaks a layer's edit whenever a prompt of one length has an open gate."""
    controller = controller_of(backbone, EARLY)
    prompts = [render_ids(backbone, text) for text in TEXTS]
    script = str(Path(__file__).with_name("faulty_server.py"))
    faulty = max(range(len(TEXTS)), key=lambda i: len(prompts[i]))
    os.environ["FAULTY_LENGTH"] = str(len(prompts[faulty]))
    try:
        with server([script], controller, tmp_path) as port:
            soft, closed = (expected(backbone, controller, policy) for policy in ("soft", "closed"))
            for stream in (False, True):
                try:
                    said = post(port, "completions", "soft", prompt=prompts[faulty], max_tokens=8, stream=stream)
                except urllib.error.HTTPError as error:
                    assert error.code == 500 and not stream
                else:
                    assert stream and '"error"' in said
            for i in range(len(TEXTS)):
                assert ask(port, prompts[i], "closed") == backbone.tokenizer.decode(closed[i], skip_special_tokens=True)
                if i != faulty:
                    assert ask(port, prompts[i], "soft") == backbone.tokenizer.decode(soft[i], skip_special_tokens=True)
            assert running(port) == 0
    finally:
        del os.environ["FAULTY_LENGTH"]
