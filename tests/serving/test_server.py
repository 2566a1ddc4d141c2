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

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these in an environment of its own")

from served_answers import EARLY, TEXTS, TOKENS, controller_of, expected

from paving.backbone import EMBEDDED, load_backbone, render_ids
from paving.controller import save_controller

REQUESTS = 200
POLICIES = (None, "default", "closed", "soft")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ask(port: int, prompt: list[int], policy: object, *, n: int = TOKENS) -> str:
    body = {"model": "base", "prompt": prompt, "max_tokens": n, "temperature": 0, "ignore_eos": True}
    if policy is not None:
        body["vllm_xargs"] = {"paving_policy": policy}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)["choices"][0]["text"]


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(EMBEDDED, dtype="float32")


@pytest.fixture(scope="module")
def controller(backbone):
    return controller_of(backbone, EARLY)


@pytest.fixture(scope="module")
def port(controller, tmp_path_factory):
    folder = save_controller(controller, tmp_path_factory.mktemp("served") / "c")
    port = free_port()
    line = [sys.executable, "-m", "paving.cli", "serve", str(folder), "--port", str(port), "--", "--dtype", "float32"]
    line += ["--max-model-len", "256", "--max-num-seqs", "8", "--served-model-name", "base"]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log = (tmp_path_factory.mktemp("log") / "server.log").open("w+")
    server = subprocess.Popen(line, env=env, stdout=log, stderr=log)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                assert server.poll() is None, log.seek(0) or log.read()[-3000:]
                time.sleep(1)
        else:
            pytest.fail("the server did not start in time")
        yield port
    finally:
        server.terminate()
        server.wait(60)
        log.close()


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
