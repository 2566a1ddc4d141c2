"""A real OpenAI-compatible endpoint on this machine: a language model behind /v1/chat/completions, with faults to order.

The model is run as a serving engine runs it: the chat template is applied to the messages and the whole text tokenised,
control strings and all. A strict JSON schema with an enum is honoured by decoding constrained to it: the likeliest of
the texts that it allows. Without a schema the model writes what it likes, greedily.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from paving.backbone import Backbone
from paving.evaluation.judges.scoring import Answers, Scorer

MODEL = "tiny"


class Fault(Exception):
    """An answer other than a completion."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


def quota_used_up() -> Fault:
    return Fault(429, "insufficient_quota", "You exceeded your current quota, please check your plan and billing details.")


def too_many_requests() -> Fault:
    return Fault(429, "rate_limit_exceeded", "Rate limit reached for requests.", {"Retry-After": "0"})


def invalid_prompt() -> Fault:
    return Fault(400, "invalid_prompt", "Invalid prompt: your prompt was flagged as potentially violating our usage policy.")


@dataclass
class Endpoint:
    """What the endpoint is like, and what it was asked. Change `answer` to order a fault.

    answer  called with (number of the request from 0, the model's own answer as a function of nothing) -> text of the
            completion; may raise Fault, or wait on `release`
    """

    backbone: Backbone
    key: str | None = None
    answer: Callable[[int, Callable[[], str]], str] = lambda _n, own: own()
    requests: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    most_at_once: int = 0
    release: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    _at_once: int = 0
    _written: dict[tuple[int, ...], str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _model: threading.Lock = field(default_factory=threading.Lock)

    def complete(self, body: dict, headers: dict) -> dict:
        with self._lock:
            number = len(self.requests)
            self.requests.append(body)
            self.headers.append(headers)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
                raise Fault(401, "invalid_api_key", f"Incorrect API key provided: {headers.get('authorization', '')[7:]}.")
            if body["model"] != MODEL:
                raise Fault(404, "model_not_found", f"The model `{body['model']}` does not exist.")
            ids = self.prompt_ids(body["messages"])
            text = self.answer(number, lambda: self.write(ids, body))
        finally:
            with self._lock:
                self._at_once -= 1
        message = {"role": "assistant", "content": text}
        return {
            "id": f"chatcmpl-{number}", "object": "chat.completion", "created": 0, "model": MODEL,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
            "usage": {"prompt_tokens": len(ids), "completion_tokens": 8, "total_tokens": len(ids) + 8},
        }  # fmt: skip

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        tokenizer = self.backbone.tokenizer
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with self._lock:
            self.prompts.append(ids)
        return ids

    def write(self, ids: list[int], body: dict) -> str:
        with self._model:
            if form := body.get("response_format"):
                return self.constrained(ids, form["json_schema"]["schema"])
            tokens = torch.tensor([ids], device=self.backbone.device)
            new = self.backbone.model.generate(input_ids=tokens, do_sample=False, max_new_tokens=min(8, body["max_tokens"]))
            return self.backbone.tokenizer.decode(new[0, len(ids) :], skip_special_tokens=True)

    def constrained(self, ids: list[int], schema: dict) -> str:
        if (written := self._written.get(tuple(ids))) is not None:
            return written
        (name, choice), *_ = schema["properties"].items()
        texts = [json.dumps({name: value}) for value in choice["enum"]]
        spellings = tuple((tuple(self.backbone.tokenizer(t, add_special_tokens=False)["input_ids"]),) for t in texts)
        scores = Scorer(self.backbone, shared=()).log_probs([ids], Answers(tuple(texts), spellings))
        return self._written.setdefault(tuple(ids), texts[int(scores[0].argmax())])


@contextmanager
def serving(endpoint: Endpoint) -> Iterator[Endpoint]:
    """Serve on a free port of this machine until left."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                if self.path != "/v1/chat/completions":
                    raise Fault(404, "not_found", f"no {self.path} here")
                self.reply(200, endpoint.complete(body, {k.lower(): v for k, v in self.headers.items()}))
            except Fault as fault:
                error = {"message": str(fault), "type": fault.code, "param": None, "code": fault.code}
                self.reply(fault.status, {"error": error}, fault.headers)

        def reply(self, status: int, body: dict, headers: dict[str, str] | None = None) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # a client that gave up leaves a broken pipe behind

    with Server(("127.0.0.1", 0), Handler) as server:
        endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield endpoint
        finally:
            endpoint.release.set()
            server.shutdown()
            thread.join()
