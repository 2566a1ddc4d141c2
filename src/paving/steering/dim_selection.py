"""DIM's choice among directions: which one takes refusals away, can bring them about, and leaves the rest alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from paving.backbone import Backbone, PromptBatch, checked_ids, render_batch
from paving.backbone.weights import float64
from paving.generation import batches_by_length
from paving.prompts.types import Prompt
from paving.steering.ablation import Ablation
from paving.steering.addition import Addition
from paving.steering.checks import SteeringError
from paving.steering.refusal_score import RefusalTokens, refusal_scores
from paving.steering.steered import Editor
from paving.traces.forward import next_token_logits


@dataclass(frozen=True)
class Limits:
    """kl: at most. induced: at least."""

    kl: float
    induced: float


@dataclass(frozen=True)
class Candidate:
    """A direction's place and scores, in this order; None: not scored, as an earlier one was beyond its limit.

    layer     the block whose output was read; position: the token, -1 is the prompt's last
    kl        mean KL(base || ablated) on benign prompts at the first answer position (nats)
    induced   mean refusal score of benign prompts with the direction added
    refusal   mean refusal score of refused prompts under ablation: the lower, the better
    """

    layer: int
    position: int
    kl: float | None = None
    induced: float | None = None
    refusal: float | None = None


@dataclass(frozen=True)
class SelectionPrompts:
    """Batches of prompts the base refuses, and of benign ones with the base's log-probabilities (n, vocab) float32."""

    refused: tuple[PromptBatch, ...]
    benign: tuple[PromptBatch, ...]
    base: tuple[Tensor, ...]

    @classmethod
    @torch.no_grad()
    def rendered(
        cls, backbone: Backbone, *, refused: Sequence[Prompt], benign: Sequence[Prompt], batch_size: int
    ) -> SelectionPrompts:
        def batches(prompts: Sequence[Prompt]) -> tuple[PromptBatch, ...]:
            rows = {p.id: checked_ids(backbone, p) for p in prompts}
            return tuple(render_batch(backbone, c) for c in batches_by_length(prompts, rows, batch_size))

        kept = batches(benign)
        return cls(batches(refused), kept, tuple(next_token_logits(backbone, b).log_softmax(-1) for b in kept))


def scored(
    backbone: Backbone,
    vector: Tensor,
    known: Candidate,
    prompts: SelectionPrompts,
    tokens: RefusalTokens,
    limits: Limits,
) -> Candidate:
    """The candidate with the scores that the choice needs under these limits; what is known is not measured again.

    vector: r, (d_model,) float32
    """
    length = float(vector.norm())
    if not length > 0:  # states that do not differ, or are not numbers, give no direction
        return known
    ablation, addition = Ablation(vector / length), Addition(vector, known.layer)
    if known.kl is None:
        known = replace(known, kl=moved(backbone, ablation, prompts))
    if not known.kl <= limits.kl:
        return known
    if known.induced is None:
        known = replace(known, induced=mean_score(edited_logits(backbone, addition, prompts.benign), tokens))
    if not known.induced >= limits.induced or known.refusal is not None:
        return known
    return replace(known, refusal=mean_score(edited_logits(backbone, ablation, prompts.refused), tokens))


def within(candidate: Candidate, limits: Limits) -> bool:
    c = candidate
    kept = c.refusal is not None and c.kl <= limits.kl and c.induced >= limits.induced
    return kept and math.isfinite(c.refusal)


def wider(limits: Limits) -> Iterator[Limits]:
    """The KL limit doubled six times; then the same without the limit on induced refusal."""
    yield from (Limits(limits.kl * 2**k, limits.induced) for k in range(1, 7))
    yield from (Limits(limits.kl * 2**k, -math.inf) for k in range(7))


@torch.no_grad()
def edited_logits(backbone: Backbone, editor: Editor, batches: Sequence[PromptBatch]) -> list[Tensor]:
    found = []
    for batch in batches:
        with editor.editing(backbone, batch, torch.ones(len(batch))):
            found.append(next_token_logits(backbone, batch))
    return found


def moved(backbone: Backbone, editor: Editor, prompts: SelectionPrompts) -> float:
    """Mean KL(base || edited) on the benign prompts at the first answer position (nats)."""
    edited = edited_logits(backbone, editor, prompts.benign)
    return torch.cat([_kl(base, logits) for base, logits in zip(prompts.base, edited, strict=True)]).mean().item()


def _kl(base: Tensor, logits: Tensor) -> Tensor:
    """(n,) float64, in nats, over the whole vocabulary."""
    edited = float64(logits).log_softmax(-1)
    return F.kl_div(edited, float64(base), log_target=True, reduction="none").sum(-1)


def mean_score(logits: Sequence[Tensor], tokens: RefusalTokens) -> float:
    return torch.cat([refusal_scores(part, tokens.ids) for part in logits]).mean().item()


def choose(candidates: Sequence[Candidate], limits: Limits) -> Candidate:
    """The lowest refusal score under ablation among those within the limits; of equals the first.

    raises SteeringError where there is none, naming how many failed each limit
    """
    if allowed := [c for c in candidates if within(c, limits)]:
        return min(allowed, key=lambda c: c.refusal)
    none = sum(c.kl is None for c in candidates)
    moved = sum(c.kl is not None and c.induced is None for c in candidates)
    mute = sum(c.induced is not None and c.refusal is None for c in candidates)
    raise SteeringError(
        f"none of {len(candidates)} refusal directions may be chosen: {none} have no length; {moved} change benign prompts "
        f"by a KL above {limits.kl:g} when ablated; of the rest {mute} reach no mean refusal score of {limits.induced:g} on "
        f"benign prompts when added; {len(candidates) - none - moved - mute} have no finite score under ablation. Give "
        "other prompts or positions (DimConfig.last_positions), or widen a limit (DimConfig.kl_limit, induced_limit)."
    )
