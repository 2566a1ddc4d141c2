"""Asks a vLLM engine in a process of its own (engine.py), with or without a controller."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from served_answers import TOKENS

from paving.backbone.embedded import embedded_checkpoint

OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 8, "block_size": 32}


def served(
    tmp_path: Path,
    controller: Path | None,
    rounds: list[tuple[list[list[int]], list[str | None]]],
    preempt_at=(),
    abort_at=None,
    model: Path | None = None,
    max_tokens: int = TOKENS,
    **options,
) -> tuple[list, dict]:
    """(answers of every round, what else the engine said). rounds: (prompts, policies), on one engine.

    model: folder of the base; the embedded model if None
    """
    asked = {
        "model": str(model or embedded_checkpoint()),
        "options": OPTIONS | options,
        "max_tokens": max_tokens,
        "preempt_at": preempt_at,
        "abort_at": abort_at or {},
        "rounds": [{"prompts": prompts, "policies": policies} for prompts, policies in rounds],
        "out": str(tmp_path / "out.json"),
    }
    env = os.environ | ({"PAVING_CONTROLLER": str(controller)} if controller is not None else {})
    script = Path(__file__).with_name("engine.py")
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(asked), text=True, capture_output=True, env=env, timeout=570
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    return said["rounds"], said


def tokens(answers: list[dict]) -> list[list[int]]:
    return [a["tokens"] for a in answers]
