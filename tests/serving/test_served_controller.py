"""A controller in vLLM answers as it does in transformers: per request, in any batch, in chunks and after preemption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these in an environment of its own")

from paving.backbone import EMBEDDED, Backbone, load_backbone, render_ids
from paving.backbone.embedded import embedded_checkpoint
from paving.controller import Hard, PavedModel, ResidualPaving, save_controller
from paving.controller.config import ControllerConfig
from tiny_models import lively

TEXTS = (
    "Name three rivers in Europe.",
    "How do I keep bread fresh for a week without a freezer, and what should I never do with it?",
    "Write one line about the sea.",
    "What is a prime number?",
    "Why is the sky blue at noon and red in the evening? Please explain it to a child of ten years.",
    "Who wrote Moby-Dick?",
)
TOKENS = 12
EARLY = ControllerConfig(route_layers=(2, 4), edit_layers=tuple(range(6, 30)))
LATE = ControllerConfig(route_layers=(8, 12), edit_layers=tuple(range(6, 30)))
OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(EMBEDDED, dtype="float32")


def controller_of(backbone: Backbone, config: ControllerConfig) -> ResidualPaving:
    """Its gate opens on about half of the prompts, and what it then adds changes the answer."""
    controller = lively(backbone, config, scale=0.2)
    logits = sorted(row.logit for row in gates_of(backbone, controller))
    middle = len(logits) // 2
    with torch.no_grad():  # so that soft gates lie around a half
        controller.weights.router.gate.bias -= (logits[middle - 1] + logits[middle]) / 2
    return controller.with_policy(Hard(0.0))


def gates_of(backbone: Backbone, controller: ResidualPaving):
    model = PavedModel(backbone, controller)
    return [model.gates(torch.tensor([render_ids(backbone, text)]))[0] for text in TEXTS]


def expected(backbone: Backbone, controller: ResidualPaving, policy: str | None) -> list[list[int]]:
    model = PavedModel(backbone, controller)
    if policy is not None:
        model.set_policy(policy)
    found = []
    for text in TEXTS:
        ids = torch.tensor([render_ids(backbone, text)])
        out = model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        found.append(out[0, ids.shape[1] :].tolist())
    return found


def served(backbone: Backbone, tmp_path: Path, controller: Path | None, rounds: list[list[str | None]], **options) -> list:
    prompts = [render_ids(backbone, text) for text in TEXTS]
    asked = {
        "model": str(embedded_checkpoint()),
        "options": OPTIONS | options,
        "max_tokens": TOKENS,
        "rounds": [{"prompts": prompts, "policies": policies} for policies in rounds],
        "out": str(tmp_path / "out.json"),
    }
    env = os.environ | ({"PAVING_CONTROLLER": str(controller)} if controller is not None else {})
    script = Path(__file__).with_name("engine.py")
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(asked), text=True, capture_output=True, env=env, timeout=570
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["rounds"]


def tokens(answers: list[dict]) -> list[list[int]]:
    return [a["tokens"] for a in answers]


def test_open_rows_are_as_in_transformers_and_closed_rows_have_plain_vllms_bits(backbone, tmp_path):
    controller = controller_of(backbone, EARLY)
    folder = save_controller(controller, tmp_path / "c")
    n = len(TEXTS)
    mixed = [("closed", None, "soft")[i % 3] for i in range(n)]
    # The second round of closed requests follows open ones: what those left in the prefix cache must not be met.
    found = served(backbone, tmp_path, folder, [["closed"] * n, [None] * n, mixed, ["closed"] * n])
    (plain,) = served(backbone, tmp_path, None, [[None] * n])
    assert found[0] == plain and tokens(found[3]) == tokens(plain)
    by = {policy: expected(backbone, controller, policy) for policy in ("closed", None, "soft")}
    assert tokens(found[1]) == by[None]
    assert sum(a != b for a, b in zip(by[None], by["closed"], strict=True)) == n // 2
    assert sum(a != b for a, b in zip(by["soft"], by["closed"], strict=True)) > n // 2
    assert tokens(found[2]) == [by[policy][i] for i, policy in enumerate(mixed)]


@pytest.mark.parametrize("config", [EARLY, LATE], ids=["early", "late"])
def test_chunked_prompts_are_read_and_edited_as_whole_ones(backbone, tmp_path, config):
    controller = controller_of(backbone, config)
    folder = save_controller(controller, tmp_path / "c")
    (found,) = served(backbone, tmp_path, folder, [[None] * len(TEXTS)], max_num_batched_tokens=16)
    assert tokens(found) == expected(backbone, controller, None)
