"""vLLM's front door: what a request asks of its gate, and what no request may ask. HTTP 400 before anything is scheduled.

SamplingParams.extra_args["paving_policy"], over HTTP `vllm_xargs`; for measuring also `paving_bucket` and `paving_veto`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any

from paving.controller.paved_model import controller_folder
from paving.controller.residual_paving import ResidualPaving
from paving.controller.store import read_description
from paving.serving.environment import ALLOW_ORACLE
from paving.serving.served import Asked, asked_for

POLICY, BUCKET, VETO = "paving_policy", "paving_bucket", "paving_veto"  # of a request's extra arguments
OURS = "paving"  # what begins so is meant for us, and must not be passed over because it is misspelt

Wrap = Callable[[Any, str, Callable[[Callable], Callable]], None]


def install(where: str, controller: ResidualPaving, wrap: Wrap) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.v1.engine.input_processor import InputProcessor

    check = functools.partial(checked, controller, makes_a_promise(where))
    wrap(InputProcessor, "_validate_params", lambda old: _validate(old, check))
    wrap(InputProcessor, "resolve_watermarking", _no_beams)  # what beam search asks first of all
    wrap(InputProcessor, "process_inputs", _no_sessions)
    for body in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        wrap(body, "to_sampling_params", lambda old: _of_body(old, check))


def asked(params: Any) -> Asked:
    """What a request asks for. Pooling requests have no such thing. raises nothing: `checked` says what is wrong"""
    extra = getattr(params, "extra_args", None) or {}
    return Asked(extra.get(POLICY), extra.get(BUCKET), extra.get(VETO))


def checked(controller: ResidualPaving, promised: bool, params: Any) -> None:
    """raises ValueError for what no request may ask for"""
    known = (POLICY, BUCKET, VETO)
    unknown = _ours(k for k in getattr(params, "extra_args", None) or {} if k not in known)
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no argument of a request; there is {', '.join(known)}.")
    asked_for(controller, asked(params), diagnostics=diagnostics_allowed(), promised=promised)


def diagnostics_allowed() -> bool:
    return os.environ.get(ALLOW_ORACLE) == "1"


def makes_a_promise(where: str) -> bool:
    return bool((read_description(controller_folder(where)).get("trained_on") or {}).get("promises"))


def _ours(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.casefold().startswith(OURS))


def _validate(old: Callable, check: Callable[[Any], None]) -> Callable:
    from vllm.exceptions import VLLMValidationError

    def validate(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            check(params)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter=POLICY, value=asked(params).policy) from None
        return old(self, params, *args, **kwargs)

    return validate


def _of_body(old: Callable, check: Callable[[Any], None]) -> Callable:
    """Where a body becomes parameters: a stream that has begun could not be HTTP 400 any more. vLLM passes over fields of a
    body that it does not know, and a gate that was to be closed would stay the default one."""
    from vllm.exceptions import VLLMValidationError

    def made(self: Any, *args: Any, **kwargs: Any) -> Any:
        misplaced = _ours(self.model_extra or {})
        if misplaced:
            raise VLLMValidationError(
                f"{', '.join(misplaced)}: no field of a request; put {POLICY} into vllm_xargs.", parameter=misplaced[0]
            )
        params = old(self, *args, **kwargs)
        try:
            check(params)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter=POLICY, value=asked(params).policy) from None
        return params

    return made


def _no_beams(old: Callable) -> Callable:
    """Beam search makes a new request of every beam and token, and takes no policy along."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams

    def resolve(self: Any, params: Any) -> bool:
        if isinstance(params, BeamSearchParams):
            raise VLLMValidationError(
                "beam search would decide a gate anew at every token; use greedy decoding or sampling."
            )
        return old(self, params)

    return resolve


def _no_sessions(old: Callable) -> Callable:
    """A session that is fed further turns keeps its first gate, and blocks that were edited under it."""
    from vllm.exceptions import VLLMValidationError

    def process(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("resumable"):
            raise VLLMValidationError(
                "a resumable request has one gate for all its turns; send each turn as its own request."
            )
        return old(self, *args, **kwargs)

    return process
