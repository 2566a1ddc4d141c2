"""vLLM's front end: every answer says what its gate did, and the metrics count it.

The engine sends a decision with the first output of a request (plugin). Here it is put into the answer, as `paving`: in
every RequestOutput's `kv_transfer_params`, in the body of a chat, completion or response, and in the first chunk of a
stream of the first two.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from paving.controller.residual_paving import ResidualPaving
from paving.serving.metrics import Watch
from paving.serving.told import FIELD, as_told

Wrap = Callable[[Any, str, Callable[[Callable], Callable]], None]
KEPT = "_paving_told"  # on vLLM's state of a request
DATA = "data: "

log = logging.getLogger(__name__)


def install(controller: ResidualPaving, wrap: Wrap, *, promised: bool = False) -> None:
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.responses.protocol import ResponsesResponse
    from vllm.v1.engine.output_processor import OutputProcessor

    watch = Watch(controller, promised=promised)
    wrap(OutputProcessor, "process_outputs", functools.partial(_remember, watch))
    wrap(OpenAIServingChat, "chat_completion_full_generator", _whole_chat)
    wrap(OpenAIServingChat, "chat_completion_stream_generator", lambda old: _stream(old, _of_chat, before=0))
    wrap(OpenAIServingCompletion, "request_output_to_completion_response", _whole_completion)
    wrap(ResponsesResponse, "from_request", _response)
    wrap(OpenAIServingCompletion, "completion_stream_generator", lambda old: _stream(old, _of_completion, before=1))


def _remember(watch: Watch, old: Callable) -> Callable:
    """Counted when it comes, and put beside every later output of that request: which of them is the last one that a user
    sees is decided here, by stop strings too."""

    def process(self: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        for output in outputs:
            state = self.request_states.get(output.request_id)
            if state is None:
                continue
            fields = (output.kv_transfer_params or {}).get(FIELD)
            if fields is not None:
                setattr(state, KEPT, fields)
                try:
                    if _first_of(state.parent_req):
                        watch.count(as_told(fields), prompt=tuple(state.prompt_token_ids or ()))
                except Exception:  # a count is worth no answer
                    log.exception("paving: the gate of %s could not be counted", output.request_id)
            elif known := getattr(state, KEPT, None):
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), FIELD: known}
        return old(self, outputs, *args, **kwargs)

    return process


def _first_of(parent: Any) -> bool:
    """Of several samples (n > 1) each is a request to the engine, with the gate of their one prompt."""
    if parent is None:
        return True
    seen = hasattr(parent, KEPT)
    setattr(parent, KEPT, True)
    return not seen


def taken(output: Any) -> dict[str, Any] | None:
    """The decision out of a RequestOutput, which no longer holds it then: what vLLM's own field says stays vLLM's."""
    params = output.kv_transfer_params or {}
    fields = params.pop(FIELD, None)
    output.kv_transfer_params = params or None
    return fields


def _whole_chat(old: Callable) -> Callable:
    async def full(self: Any, request: Any, results: AsyncIterator[Any], *args: Any, **kwargs: Any) -> Any:
        told: list[dict] = []
        response = await old(self, request, _seen(results, _of_chat, told), *args, **kwargs)
        if told and hasattr(response, "choices"):  # an error has none
            setattr(response, FIELD, told[-1])
        return response

    return full


def _whole_completion(old: Callable) -> Callable:
    def whole(self: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        told = [taken(output) for output in outputs]
        response = old(self, outputs, *args, **kwargs)
        setattr(response, FIELD, told[0] if len(told) == 1 else told)
        return response

    return whole


def _response(old: Callable) -> Callable:
    """A class method, bound already. Its caller hands vLLM's field on as it came from the last output."""

    def made(*args: Any, **kwargs: Any) -> Any:
        params = dict(kwargs.get("kv_transfer_params") or {})
        fields = params.pop(FIELD, None)
        response = old(*args, **{**kwargs, "kv_transfer_params": params or None})
        if fields is not None:
            setattr(response, FIELD, fields)
        return response

    return made


def _of_chat(result: Any) -> dict[str, Any] | None:
    return taken(result)


def _of_completion(result: tuple[int, Any]) -> dict[str, Any] | None:
    index, output = result
    fields = taken(output)
    return None if fields is None else fields | {"prompt": index}


async def _seen(results: AsyncIterator[Any], of: Callable[[Any], dict | None], told: list[dict]) -> AsyncIterator[Any]:
    async for result in results:
        if (fields := of(result)) is not None and fields not in told:
            told.append(fields)
        yield result


def _stream(old: Callable, of: Callable[[Any], dict | None], *, before: int) -> Callable:
    """before: how many arguments stand between the request and the results."""

    async def stream(self: Any, request: Any, *args: Any, **kwargs: Any) -> AsyncIterator[str]:
        told: list[dict] = []
        said = 0
        args = (*args[:before], _seen(args[before], of, told), *args[before + 1 :])
        async for chunk in old(self, request, *args, **kwargs):
            if said < len(told) and chunk.startswith(DATA + "{"):
                chunk = f"{DATA}{json.dumps(json.loads(chunk[len(DATA) :]) | {FIELD: told[said]}, ensure_ascii=False)}\n\n"
                said += 1
            yield chunk

    return stream
