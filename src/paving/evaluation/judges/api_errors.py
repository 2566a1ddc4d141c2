"""What went wrong at an endpoint, in one line that says what to do, and that holds no key."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass

from paving.evaluation.judges.untrusted import JudgeError

LONGEST = 200  # characters of an endpoint's own message that are passed on
LEAST_KEY = 8  # shorter values of key variables are placeholders such as "none"


@dataclass(frozen=True)
class Endpoint:
    """model and address as messages show them; address "" is the provider's own; key: the variable that holds the key."""

    model: str
    address: str
    key: str | None
    timeout: int

    def __str__(self) -> str:
        return f"{self.model} at {self.address}" if self.address else self.model

    @property
    def key_hint(self) -> str:
        if self.key is not None:
            return f"Check the key in {self.key}."
        if self.address:
            return "It was sent no key of yours: name the variable that holds one with key=VARIABLE."
        return "Check the key in the provider's variable, such as OPENAI_API_KEY."


def plainly(error: BaseException, endpoint: Endpoint) -> JudgeError:
    """The error as one line. Told by HTTP status and by name, since each provider has exceptions of its own."""
    error = _inner(error)
    if isinstance(error, JudgeError):
        return error
    status = getattr(error, "status_code", None)
    name, said = type(error).__name__, _said(error, endpoint.key)
    match status:
        case 401:
            # Its message is left out: it may show part of the key.
            return JudgeError(f"{endpoint} refuses the key (401). {endpoint.key_hint}")
        case 403:
            return JudgeError(f"{endpoint} refuses the request (403): {said} {endpoint.key_hint}")
        case 404:
            return JudgeError(
                f"no {endpoint} is known there (404): {said} Check the model's name, and that base_url ends as the "
                "endpoint wants it, mostly in /v1."
            )
        case 429 if quota_used_up(error):
            return JudgeError(f"the quota of {endpoint} is used up (429). Raise it, or go on when it is renewed.")
        case 429:
            return JudgeError(f"{endpoint} still has too many requests (429): {said} Set or lower rpm, tpm or concurrency.")
        case int() if status >= 500:
            return JudgeError(f"{endpoint} fails ({status}): {said} Try again later.")
        case int():
            return JudgeError(f"{endpoint} does not take the request ({status}): {said}")
    if name in ("AttemptTimeoutError", "APITimeoutError") or isinstance(error, TimeoutError):
        return JudgeError(
            f"{endpoint} did not answer within {endpoint.timeout} s. See whether it is alive, or raise timeout=SECONDS."
        )
    if "Connect" in name or isinstance(error, ConnectionError):
        return JudgeError(f"cannot reach {endpoint}. See whether it runs, and whether base_url is its address.")
    return JudgeError(f"cannot use {endpoint}: {said}")


def quota_used_up(error: BaseException) -> bool:
    """Whether a 429 says that there is nothing left to spend, rather than that requests come too fast."""
    told = f"{getattr(error, 'code', '')} {error}".lower()
    return getattr(error, "status_code", None) == 429 and (
        "insufficient_quota" in told or "exceeded your current quota" in told
    )


@dataclass
class Retries:
    """Whether a request that failed is sent again: what the client takes for passing, but for two things.

    A quota that is used up: most providers take it for one of the 429 that pass, and would ask for a quarter of an hour.
    And an address where nothing has answered yet: it is mistyped, or its server was not started. Once something has
    answered there (`reached`), a connection that fails is one that passes.
    """

    passing: Callable[[BaseException], bool]
    reached: bool = False

    def __call__(self, error: BaseException) -> bool:
        self.reached = self.reached or getattr(error, "status_code", None) is not None
        return False if quota_used_up(error) or (not self.reached and unreachable(error)) else self.passing(error)


def unreachable(error: BaseException) -> bool:
    """Whether no connection could be made at all: refused, or no such host. Told by its causes, a client's own by name."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    return any(isinstance(e, ConnectionRefusedError | socket.gaierror) or type(e).__name__ == "ConnectError" for e in causes)


def _inner(error: BaseException) -> BaseException:
    """The provider's own error: behind a retry that gave up, or behind Inspect's, whose text is the whole request."""
    last = getattr(error, "last_attempt", None)
    inner = last.exception() if last is not None else None
    if type(error).__name__ == "ModelGenerateError":
        inner = error.__cause__
    return error if inner is None else _inner(inner)


def _said(error: BaseException, key: str | None) -> str:
    """The error's own words on one line, shortened, without Inspect's markup and without anything that is a key here."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    text = str(message or getattr(error, "message", None) or error or type(error).__name__)
    text = " ".join(re.sub(r"\[/?(?:bold|blue)\]", "", text).split()).removeprefix("ERROR: ")
    for variable, value in os.environ.items():
        if (variable == key or variable.upper().endswith(("KEY", "TOKEN"))) and len(value) >= LEAST_KEY:
            text = text.replace(value, f"[{variable}]")
    shown = text if len(text) <= LONGEST else text[:LONGEST] + " ..."
    return shown if shown.endswith((".", "!", "?")) else f"{shown}."
