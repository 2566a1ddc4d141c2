"""The entry point. Nothing of ours is imported at its top: vLLM logs what fails to import and serves without it, while what
fails inside `register` stops the server."""

from __future__ import annotations

import os

CONTROLLER = "PAVING_CONTROLLER"
ALLOW_ORACLE = "PAVING_ALLOW_ORACLE"  # 1: requests may give their prompt's true bucket, and ask for the oracle


def register() -> None:
    """vLLM calls it in every process, sometimes twice."""
    if where := os.environ.get(CONTROLLER):
        # On some machines vLLM would take its second model runner, which serves no controller.
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        from paving.serving.plugin import install

        install(where)
