"""vLLM as the engine of an evaluation: the rows of a run's table, each request under its row's gate.

One engine serves all rows, and so all of them share its controller's experts, scale and mixture; what they differ in, a
request asks for. The base is a closed gate, which leaves plain vLLM's bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from paving.backbone import Backbone, checked_ids
from paving.controller.gates import Oracle
from paving.controller.residual_paving import ResidualPaving
from paving.controller.store import ControllerError
from paving.generation import Completion, Decoding, Tick, completion_of
from paving.intervention import Identity, Intervention, RowState
from paving.processes import rank_and_world
from paving.prompts.types import Prompt
from paving.serving.admission import BUCKET, POLICY, VETO
from paving.serving.command import NEEDED, local_checkpoint
from paving.serving.environment import ALLOW_ORACLE, CONTROLLER
from paving.serving.plugin import ServingError, install, installed
from paving.serving.told import FIELD, Told, as_told

CHUNK = 256  # prompts handed over at once: between two chunks there is progress to show


@contextmanager
def vllm_engine(
    folder: Path, controller: ResidualPaving, backbone: Backbone, options: Mapping[str, object]
) -> Iterator[VllmEngine]:
    """folder: the controller's, as saved; options: of vLLM's LLM, over those that a controller needs.

    raises ControllerError where vLLM is not installed, ServingError for what cannot be served, or not in this process
    """
    if rank_and_world()[1] > 1:
        raise ServingError("vLLM decodes in processes of its own; start this evaluation in one, without a launcher.")
    if find_spec("vllm") is None:
        raise ControllerError(f"the engine vllm needs vLLM, {NEEDED}")
    settings = {
        CONTROLLER: str(folder.resolve()), ALLOW_ORACLE: "1", "VLLM_USE_V2_MODEL_RUNNER": "0",
        # Its log would stand between the lines of --json.
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    }  # fmt: skip
    arguments = {
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "enforce_eager": True,
        "enable_prefix_caching": controller.config.pooling == "last",
        **options,
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    try:
        import vllm

        where = settings[CONTROLLER]
        if installed() not in (None, where):
            raise ServingError(f"vLLM was told of {installed()} in this process already. Evaluate {folder} in another one.")
        install(where)  # vLLM loads its plugins once a process, and that may have been before the controller was known
        model = vllm.LLM(model=str(local_checkpoint(controller.base_name)), **arguments)
        try:
            yield VllmEngine(model, controller, f"vllm {vllm.__version__}", arguments)
        finally:
            model.llm_engine.engine_core.shutdown()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class VllmEngine:
    """Decodes rows of one controller. An Engine of paving.generation."""

    def __init__(self, model: Any, controller: ResidualPaving, name: str, settings: Mapping[str, object]):
        self.model, self.controller, self.name = model, controller, name
        self.key = f"{name} {json.dumps(settings, sort_keys=True, default=str)}"

    def generate(
        self,
        backbone: Backbone,
        prompts: Sequence[Prompt],
        intervention: Intervention,
        decoding: Decoding,
        *,
        tick: Tick | None = None,
        **_batching: object,
    ) -> list[Completion]:
        """As paving.generation.generate; the engine batches as it likes, and decodes every row anew, so that what a caller
        says of batches and known answers is nothing to it.

        raises ValueError for a row that this engine does not serve, RuntimeError where a gate could not be decided
        """
        import vllm

        found: list[Completion] = []
        for start in range(0, len(prompts), CHUNK):
            chunk = prompts[start : start + CHUNK]
            params = [
                vllm.SamplingParams(
                    max_tokens=decoding.max_new_tokens,
                    temperature=decoding.temperature if decoding.do_sample else 0.0,
                    top_p=decoding.top_p if decoding.do_sample else 1.0,
                    seed=decoding.seed if decoding.do_sample else None,
                    stop_token_ids=list(backbone.eos_ids),
                    extra_args=asked_of(self.controller, intervention, prompt),
                )
                for prompt in chunk
            ]
            ids = [checked_ids(backbone, prompt, room=decoding.max_new_tokens) for prompt in chunk]
            outputs = self.model.generate([{"prompt_token_ids": i} for i in ids], params, use_tqdm=False)
            for prompt, output in zip(chunk, outputs, strict=True):
                fields = (output.kv_transfer_params or {}).get(FIELD)
                if fields is None:
                    raise RuntimeError(
                        f"vLLM says nothing of the gate of {prompt.id}: see its log; or VLLM_PLUGINS leaves paving out."
                    )
                told = as_told(fields)
                if told.failed:
                    raise RuntimeError(f"the gate of {prompt.id} could not be decided in vLLM; its log says why.")
                found.append(completion_of(backbone, prompt, output.outputs[0].token_ids, _state(told)))
            if tick is not None:
                tick(len(chunk))
        return found


def asked_of(mine: ResidualPaving, intervention: Intervention, prompt: Prompt) -> dict[str, object]:
    """What a request of a row asks of an engine that serves `mine`. Only the oracle's tells the prompt's bucket.

    raises ValueError for a row that does something else than `mine` under another gate
    """
    if isinstance(intervention, Identity):
        return {POLICY: "closed"}
    same = isinstance(intervention, ResidualPaving) and (
        intervention.base_fingerprint == mine.base_fingerprint
        and intervention.weights is mine.weights
        and (intervention.scale, intervention.mixture) == (mine.scale, mine.mixture)
    )
    if not same:
        raise ValueError(
            f"vLLM serves this run's controller with its own scale and mixture; the row {intervention.name!r} has "
            "others. Leave it out, or decode with transformers."
        )
    asked: dict[str, object] = {POLICY: intervention.policy.name, VETO: int(intervention.use_veto)}
    if intervention.policy == mine.policy:
        asked[POLICY] = "default"
    elif intervention.policy != mine.policy_named(intervention.policy.name):
        raise ValueError(f"the row {intervention.name!r} has a threshold of its own, and vLLM the calibrated one.")
    if isinstance(intervention.policy, Oracle):
        asked[BUCKET] = prompt.bucket.value
    return asked


def _state(told: Told) -> RowState:
    return RowState(gate=told.gate, logit=told.logit, veto=told.veto, mixture=told.mixture)
