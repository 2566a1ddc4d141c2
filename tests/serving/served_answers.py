"""What the tests of serving share: prompts, controllers whose gates differ, and their answers in transformers."""

from __future__ import annotations

import torch

from paving.backbone import Backbone, render_ids
from paving.controller import Hard, PavedModel, ResidualPaving
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
TOKENS = 28  # so that answers fill blocks of 32 tokens
EARLY = ControllerConfig(route_layers=(2, 4), edit_layers=tuple(range(6, 30)))
LATE = ControllerConfig(route_layers=(8, 12), edit_layers=tuple(range(6, 30)))
SHIPPED = ControllerConfig(route_layers=(8, 12, 16), edit_layers=tuple(range(5, 30)), pooling="last+mean")  # as the demo's


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
