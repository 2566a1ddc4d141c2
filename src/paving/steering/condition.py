"""CAST's condition: does this prompt look like the category? One layer, one vector, one threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from paving.backbone import Backbone, PromptBatch, checked_ids, render_ids
from paving.intervention import RowState
from paving.prompts.types import Prompt
from paving.steering.checks import SteeringError
from paving.steering.states import Tick, direction, mean_states, tail_means


class ConditionConfig(BaseModel):
    """layers: which may be chosen, default all but the first, as in CAST's code. extraction: see `states.direction`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[int, ...] | None = Field(None, min_length=1)
    extraction: Literal["pca_pairwise", "pca_center"] = "pca_pairwise"
    batch_size: int = Field(16, ge=1)


@dataclass(frozen=True)
class Condition:
    """Met by a prompt where cos(h, tanh(P_c h)) lies on the given side of the threshold (CAST, section 3).

    layer       the block whose output is read
    vector      c, (d_model,) float32. Its sign does not matter: P_c = c cᵀ / (c · c)
    threshold   of the similarity
    side        `>` or `<`: CAST's comparator
    f1          on the prompts it was fitted on, the harmful ones being the positives
    """

    layer: int
    vector: Tensor
    threshold: float
    side: Literal[">", "<"]
    f1: float

    @property
    def name(self) -> str:
        return "condition"

    def route(self, backbone: Backbone, batch: PromptBatch) -> tuple[RowState, ...]:
        """Open where the condition is met; `logit` is the margin by which it is met or missed."""
        return tuple(RowState(gate=float(m > 0), logit=m) for m in self.margins(backbone, batch).tolist())

    def margins(self, backbone: Backbone, batch: PromptBatch) -> Tensor:
        """(n,) float32: how far each row's similarity lies on the side where the condition is met; met above 0.

        Read in one unedited pass over the prompts, each row by itself: the mean over its own tokens, padding left out.
        """
        ids, mask = batch.input_ids, batch.attention_mask
        state = mean_states(backbone, ids, mask, mask, (self.layer,))[self.layer]
        above = similarity(state, self.vector.to(state.device)) - self.threshold
        return above if self.side == ">" else -above


def similarity(states: Tensor, vector: Tensor) -> Tensor:
    """cos(h, tanh(P_c h)) of each state: (n, d_model) and (d_model,) float32 -> (n,)."""
    projected = (states @ vector)[:, None] * vector / (vector @ vector)
    return torch.cosine_similarity(states, projected.tanh(), dim=-1)


def fit_condition(
    backbone: Backbone,
    pairs: Sequence[tuple[str | Prompt, str | Prompt]],
    config: ConditionConfig | None = None,
    *,
    tick: Tick | None = None,
) -> Condition:
    """c per layer by PCA of harmful against benign prompts; layer, threshold and side by the best F1 over the pairs.

    pairs  (harmful, benign) requests: texts, or prompts as they are asked
    tick   called with how many of the 2 · len(pairs) prompts are done

    raises SteeringError without pairs, or where harmful and benign prompts are the same
    """
    config = config or ConditionConfig()
    if not pairs:
        raise SteeringError("a condition needs pairs of a harmful and a benign prompt; none were given.")
    layers = config.layers or tuple(range(min(1, backbone.n_layers - 1), backbone.n_layers))
    backbone.check_layers(layers, "condition")
    rows = [
        checked_ids(backbone, one) if isinstance(one, Prompt) else render_ids(backbone, one)
        for side in zip(*pairs, strict=True)
        for one in side
    ]
    lengths = [len(r) for r in rows]
    states = tail_means(backbone, rows, lengths, layers, batch_size=config.batch_size, tick=tick)
    harmful, benign = states[: len(pairs)], states[len(pairs) :]
    best: tuple[Split, Condition] | None = None
    for i, layer in enumerate(layers):
        vector = direction(harmful[:, i], benign[:, i], config.extraction)
        split = best_split(similarity(harmful[:, i], vector), similarity(benign[:, i], vector))
        if best is None or (split.f1, split.room) > (best[0].f1, best[0].room):
            best = split, Condition(layer, vector, split.threshold, split.side, split.f1)
    return best[1]


class Split(NamedTuple):
    """room: the gap that the threshold lies in, as a share of the spread of all similarities; decides between equals."""

    f1: float
    room: float
    threshold: float
    side: Literal[">", "<"]


def best_split(positive: Tensor, negative: Tensor) -> Split:
    """The threshold and side with the best F1; among equals, the one in the widest gap.

    Tried is the middle of every gap between neighbouring similarities: whatever grid CAST's search walks, a threshold
    of its grid splits the prompts as one of these does. One that all prompts, or none, would meet is none.
    """
    values = torch.cat([positive, negative]).double()
    order = values.argsort()
    is_positive = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).double()[order]
    ordered = values[order]
    gaps = ordered.diff()
    if not bool(gaps.any()):
        raise SteeringError("every prompt has the same similarity to the condition, so no threshold tells them apart.")
    below = is_positive.cumsum(0)[:-1]  # positives under each gap
    under = torch.arange(1, len(ordered), dtype=torch.float64)
    total, n = float(len(positive)), float(len(ordered))
    spread = float(ordered[-1] - ordered[0])
    found = []
    for side, hits, met in ((">", total - below, n - under), ("<", below, under)):
        f1 = 2 * hits / (met + total)
        f1[gaps == 0] = -1.0  # equal similarities cannot be told apart by a threshold
        k = int(torch.where(f1 == f1.max(), gaps, -1.0).argmax())
        found.append(Split(float(f1[k]), float(gaps[k]) / spread, float(ordered[k] + ordered[k + 1]) / 2, side))
    return max(found, key=lambda split: (split.f1, split.room))
