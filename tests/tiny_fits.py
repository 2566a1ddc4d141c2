"""Small fits that the tests of training share: prompts, targets and a schedule of seconds."""

from __future__ import annotations

import torch

from paving.controller import fresh_controller
from paving.prompts.types import Bucket, Splits
from paving.traces.store import TraceStore
from paving.training.config import TrainingConfig
from paving.training.prepare import prepare
from paving.training.stages import fit
from tiny_models import ROUTED, prompt

CONFIG = TrainingConfig(
    gate_epochs=2, stage_epochs=(1, 2, 1), short_horizon=3, horizon=6, learning_rate=1e-2, gate_learning_rate=1e-2,
    contrastive_learning_rate=1e-2, gate_batch=4, rows_per_step=(3, 1, 1), top_k=16, targets="own", hard_negatives=2,
)  # fmt: skip
EPOCHS = [("gate", 1), ("gate", 2), ("contrastive", 1), ("stage 1", 1), ("stage 2", 1), ("stage 2", 2), ("stage 3", 1)]


def splits(n_edit=6, n_benign=3, n_harmful=3) -> Splits:
    """Edit prompts begin with w1, benign keeps with w60, harmful keeps with w120; all unequally long."""
    rows = []
    for bucket, first, n in ((Bucket.EDIT, 1, n_edit), (Bucket.BENIGN_KEEP, 60, n_benign),
                             (Bucket.HARMFUL_KEEP, 120, n_harmful)):  # fmt: skip
        for i in range(n):
            words = [first, *range(first + 5 + i, first + 8 + 2 * i)]
            target = f"w150 w{151 + i % 3} w155 w156 w157 w158" if bucket == Bucket.EDIT else None
            rows.append(prompt(f"{bucket.value}-{i}", words, bucket, target))
    return Splits(train=tuple(rows), calibration=(), held_out=())


def answered(completions) -> list[str]:
    """Labels of a judge for whom everything is an ordinary answer."""
    return ["HARMLESS-BENIGN"] * len(completions)


def prepared(backbone, folder, config=CONFIG, **sizes):
    return prepare(backbone, TraceStore(folder), splits(**sizes), config, answered)


def fitted(base, ready, folder, config=CONFIG, watch=lambda *_: None, seed=0, controller=None):
    controller = controller or fresh_controller(base, ROUTED, seed)
    records = fit(base, controller, ready.traces, ready.rows, config, folder, watch)
    return controller, records


def same(a, b) -> bool:
    one, two = a.weights.state_dict(), b.weights.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
