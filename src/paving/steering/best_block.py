"""Which block an answer vector is added behind: the one that makes edit targets likelier than refusals by most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paving.backbone import Backbone, checked_ids, render_batch
from paving.generation import batches_by_length
from paving.prompts.types import Prompt, SplitName
from paving.steering.checks import SteeringError
from paving.steering.material import Material
from paving.steering.steered import Editor
from paving.traces.forward import pad_right, teacher_forced_logits


@dataclass(frozen=True)
class BestBlock:
    """margins: block -> mean over prompts of log p(edit target) − log p(refusal), nats a token, under its editor."""

    layer: int
    margins: Mapping[int, float]


def best_block(
    backbone: Backbone,
    material: Material,
    editor_at: Callable[[int], Editor],
    layers: Iterable[int],
    *,
    answer_tokens: int,
    batch_size: int = 16,
    tick: Callable[[int], None] = lambda _n: None,
) -> BestBlock:
    """Calibration edit prompts under every block's editor at strength 1; nothing is decoded.

    answer_tokens  of both answers at most so many are looked at
    tick           called as n more blocks are done

    raises SteeringError without blocks, or where no block has a margin that is a number
    """
    prompts = material.with_target(SplitName.CALIBRATION)
    margins = {}
    for layer in layers:
        editor = editor_at(layer)
        target, refusal = (
            log_likelihood(backbone, prompts, {p.id: known[p.id][:answer_tokens] for p in prompts}, editor, batch_size)
            for known in (material.targets, material.answers)
        )
        margins[layer] = sum(target[p.id] - refusal[p.id] for p in prompts) / len(prompts)
        tick(1)
    finite = {layer: m for layer, m in margins.items() if m == m and abs(m) != float("inf")}
    if not finite:
        raise SteeringError(f"none of {len(margins)} blocks makes edit targets likelier or less likely by a finite number.")
    return BestBlock(max(finite, key=lambda layer: finite[layer]), margins)


@torch.no_grad()
def log_likelihood(
    backbone: Backbone, prompts: Sequence[Prompt], answers: Mapping[str, Sequence[int]], editor: Editor, batch_size: int
) -> dict[str, float]:
    """Prompt id -> mean log-probability of the answer's tokens under the editor at strength 1 (nats a token)."""
    rows = {p.id: checked_ids(backbone, p, room=len(answers[p.id])) for p in prompts}
    found = {}
    for chunk in batches_by_length(prompts, rows, batch_size):
        batch = render_batch(backbone, chunk)
        tails = [list(answers[p.id]) for p in chunk]
        continuation, _ = pad_right(tails, 0, backbone.device)
        with editor.editing(backbone, batch, torch.ones(len(batch))):
            logits = teacher_forced_logits(backbone, batch, continuation)
        for p, tail, row in zip(chunk, tails, logits, strict=True):
            found[p.id] = _mean_log_probability(row, tail)
    return found


def _mean_log_probability(logits: Tensor, tokens: Sequence[int]) -> float:
    chosen = logits[: len(tokens)].float().log_softmax(-1).gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    return chosen.mean().item()
