"""The entry point. Nothing that could fail is imported at its top: vLLM logs what fails to import and serves without it,
while what fails inside `register` stops the server."""

from __future__ import annotations

import os

from paving.serving.environment import CONTROLLER


def register() -> None:
    """vLLM calls it in every process, sometimes twice."""
    if where := os.environ.get(CONTROLLER):
        # On some machines vLLM would take its second model runner, which serves no controller.
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        from paving.serving.plugin import install

        install(where)
