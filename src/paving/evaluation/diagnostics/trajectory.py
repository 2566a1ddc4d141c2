"""Where the edit moves the residual stream (Residual Paving, A.6): towards the edit target, or merely off the refusal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paving.backbone import Backbone, PromptBatch, checked_ids, pad_left
from paving.backbone.hooks import record_residuals
from paving.generation import batches_by_length
from paving.intervention import Identity, Intervention
from paving.prompts.types import Prompt
from paving.traces.forward import pad_right, teacher_forced_logits
from paving.traces.targets import EditTarget

Tick = Callable[[int], None]


@dataclass(frozen=True)
class Alignment:
    """One edit prompt. Cosines lie in [-1, 1]; nan where a displacement is zero (a layer before the first edit).

    edit, refusal              (n_layers, T-1) float32: cos(D^I, D^E) and cos(D^I, D^R) at layer l, step t = 1..T-1
    edit_whole, refusal_whole  the cosines over all listed layers and steps at once, as A.6 writes them
    nll_base, nll_edited       mean nats per token of the edit target, without and with the intervention
    gate                       effective gate; 0.0 where it was closed, and then every cosine is nan

    Step 0 is left out: base and refusal-like states are one and the same there, so D^R has no direction.
    """

    id: str
    edit: np.ndarray
    refusal: np.ndarray
    edit_whole: float
    refusal_whole: float
    nll_base: float
    nll_edited: float
    gate: float


@torch.no_grad()
def alignments(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    targets: Mapping[str, EditTarget],
    refusals: Mapping[str, tuple[int, ...]],
    intervention: Intervention,
    layers: Sequence[int],
    *,
    batch_size: int = 8,
    tick: Tick | None = None,
) -> list[Alignment]:
    """Alignment of the intervention's displacement on edit prompts, everything teacher-forced.

    targets   prompt id -> edit target y^E with its teacher prompt; H^0 and H^I run it on the prompt, H^E on the teacher's
    refusals  prompt id -> the base's own refusal as token ids; H^R is the base on the prompt with it, cut to y^E's length
    layers    blocks whose outputs are compared

    raises ValueError naming the first prompt whose target and refusal have fewer than two tokens in common length.
    """
    steps = {p.id: min(len(targets[p.id].continuation), len(refusals[p.id])) for p in prompts}
    short = [i for i, n in steps.items() if n < 2]
    if short:
        raise ValueError(
            f"{len(short)} edit prompts have a target or refusal of fewer than two tokens (first: {short[0]}); "
            "a trajectory needs two. Leave them out, or give longer targets."
        )
    ids = {p.id: checked_ids(backbone, p) for p in prompts}
    found: dict[str, Alignment] = {}
    for chunk in batches_by_length(prompts, ids, batch_size):
        target = [targets[p.id].continuation[: steps[p.id]] for p in chunk]
        refusal = [refusals[p.id][: steps[p.id]] for p in chunk]
        plain = _batch(backbone, chunk, [ids[p.id] for p in chunk])
        taught = _batch(backbone, chunk, [targets[p.id].teacher_ids for p in chunk])
        base, nll_base, _ = _forced(backbone, plain, target, Identity(), layers)
        edited, nll_edited, gates = _forced(backbone, plain, target, intervention, layers)
        to_target = _forced(backbone, taught, target, Identity(), layers)[0] - base
        to_refusal = _forced(backbone, plain, refusal, Identity(), layers)[0] - base
        moved = edited - base
        for i, p in enumerate(chunk):
            span = slice(1, steps[p.id])
            mine, towards, away = moved[i, :, span], to_target[i, :, span], to_refusal[i, :, span]
            found[p.id] = Alignment(
                id=p.id,
                edit=_cosine(mine, towards).numpy(),
                refusal=_cosine(mine, away).numpy(),
                edit_whole=_cosine(mine.flatten(), towards.flatten()).item(),
                refusal_whole=_cosine(mine.flatten(), away.flatten()).item(),
                nll_base=nll_base[i],
                nll_edited=nll_edited[i],
                gate=gates[i],
            )
        if tick is not None:
            tick(len(chunk))
    return [found[p.id] for p in prompts]


@torch.no_grad()
def base_path_rms(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    continuations: Mapping[str, tuple[int, ...]],
    intervention: Intervention,
    layers: Sequence[int],
    *,
    batch_size: int = 8,
) -> dict[str, float]:
    """Prompt id -> root mean square of H^I - H^0 along the base's own continuation (residual-stream units).

    For keeps: 0 exactly where the gate stayed closed.
    """
    ids = {p.id: checked_ids(backbone, p) for p in prompts}
    result: dict[str, float] = {}
    for chunk in batches_by_length(prompts, ids, batch_size):
        batch = _batch(backbone, chunk, [ids[p.id] for p in chunk])
        forced = [continuations[p.id] for p in chunk]
        edited = _forced(backbone, batch, forced, intervention, layers)[0]
        moved = edited - _forced(backbone, batch, forced, Identity(), layers)[0]
        for i, p in enumerate(chunk):
            result[p.id] = moved[i, :, : len(forced[i])].pow(2).mean().sqrt().item()
    return result


def _batch(backbone: Backbone, prompts: Sequence[Prompt], rows: Sequence[Sequence[int]]) -> PromptBatch:
    ids, mask = pad_left(backbone, rows)
    return PromptBatch(ids, mask, tuple(p.id for p in prompts), tuple(p.bucket for p in prompts))


def _forced(
    backbone: Backbone,
    batch: PromptBatch,
    continuations: Sequence[Sequence[int]],
    intervention: Intervention,
    layers: Sequence[int],
) -> tuple[Tensor, list[float], list[float]]:
    """States (n, n_layers, T, d) float32 on the CPU, mean nats per forced token (n), effective gates (n)."""
    tokens, mask = pad_right(continuations, backbone.pad_id, backbone.device)
    n_steps = tokens.shape[1]

    def forced(resid: Tensor) -> Tensor:
        return resid[:, -n_steps:].float().cpu()

    with intervention.apply(backbone, batch) as applied, record_residuals(backbone, layers, keep=forced) as states:
        logits = teacher_forced_logits(backbone, batch, tokens)
    log_probs = logits.float().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1) * mask
    nll = (-log_probs.sum(-1) / mask.sum(-1)).tolist()
    return torch.stack([states[layer] for layer in layers], dim=1), nll, [row.gate for row in applied.rows()]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over the last dimension; nan where either side is zero, since zero has no direction."""
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(norms > 0, (a * b).sum(-1) / norms, torch.nan)
