"""Where the edit moves the residual stream (Residual Paving, A.6): towards the edit target, or merely off the refusal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paving.backbone import Backbone, checked_ids
from paving.evaluation.diagnostics.forced import ForcedPrompts, LateStart
from paving.generation import batches_by_length
from paving.prompts.types import Prompt
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
    intervention: LateStart,
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
        plain = ForcedPrompts(backbone, chunk, [ids[p.id] for p in chunk])
        taught = ForcedPrompts(backbone, chunk, [targets[p.id].teacher_ids for p in chunk])
        base = plain.run(target, layers)
        edited = plain.run(target, layers, intervention)
        to_target = taught.run(target, layers).states - base.states
        to_refusal = plain.run(refusal, layers).states - base.states
        moved = edited.states - base.states
        for i, p in enumerate(chunk):
            span = slice(1, steps[p.id])
            mine, towards, away = moved[i, :, span], to_target[i, :, span], to_refusal[i, :, span]
            found[p.id] = Alignment(
                id=p.id,
                edit=_cosine(mine, towards).numpy(),
                refusal=_cosine(mine, away).numpy(),
                edit_whole=_cosine(mine.flatten(), towards.flatten()).item(),
                refusal_whole=_cosine(mine.flatten(), away.flatten()).item(),
                nll_base=base.nll[i],
                nll_edited=edited.nll[i],
                gate=edited.gates[i],
            )
        if tick is not None:
            tick(len(chunk))
    return [found[p.id] for p in prompts]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over the last dimension; nan where either side is zero, since zero has no direction."""
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(norms > 0, (a * b).sum(-1) / norms, torch.nan)
