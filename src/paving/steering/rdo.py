"""GoR-RDO: a refusal direction learned by gradient (Geometry of Refusal, arXiv 2502.17420)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from paving.backbone import Backbone, PromptBatch, checked_ids, pad_left
from paving.backbone.hooks import Edit, contiguous_head_input, edit_residuals
from paving.prompts.types import Bucket, SplitName
from paving.steering.ablation import Ablation
from paving.steering.checks import SteeringError
from paving.steering.material import Material
from paving.steering.row_edits import Change, ablating, adding
from paving.steering.stream_points import edit_stream
from paving.traces.base import Forced, forced_batch
from paving.traces.forward import pad_right, teacher_forced_logits
from paving.training.losses import cross_entropy


@dataclass(frozen=True)
class Loss:
    """Means over rows, in nats. total: the weighted sum that is minimised."""

    total: float
    ablation: float
    addition: float
    retain: float


Watch = Callable[[int, Loss], None]
"""Called after each step with its number, from 1, and its training loss."""


class RDOConfig(BaseModel):
    """Defaults are those of the published code, except for the steps and what is checked (below).

    steps                of AdamW; the published code makes one epoch over its prompts
    batch_size           rows of each of the three kinds a step; micro_batch of them are in memory at once
    horizon              longest target, in tokens; also how many last positions are retained
    check_every          steps between two looks at the calibration rows, at most `check_rows` of each kind
    patience             looks without a lower loss before the learning rate falls to a tenth; after `reductions` of that the
                         search ends. The published code looks at each step's training loss, which is another batch each time
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(100, ge=1)
    batch_size: int = Field(16, ge=1)
    micro_batch: int = Field(4, ge=1)
    learning_rate: float = Field(1e-2, gt=0)
    ablation_weight: float = Field(1.0, gt=0)
    addition_weight: float = Field(0.2, ge=0)
    retain_weight: float = Field(1.0, ge=0)
    horizon: int = Field(30, ge=2)
    check_every: int = Field(10, ge=1)
    check_rows: int = Field(16, ge=1)
    patience: int = Field(3, ge=1)
    reductions: int = Field(2, ge=0)


@dataclass(frozen=True)
class LearnedDirection:
    """r̂, to be ablated.

    unit       (d_model,) float32, of length 1, on the CPU
    best_step  after which it stood; 0: no step had a lower calibration loss than the initial direction
    losses     training loss of every step made
    checks     (step, calibration loss) of every look, step 0 included
    """

    unit: Tensor
    best_step: int
    losses: tuple[Loss, ...]
    checks: tuple[tuple[int, Loss], ...]

    def editor(self) -> Ablation:
        return Ablation(self.unit)


def fit_rdo(
    backbone: Backbone,
    material: Material,
    *,
    initial: Tensor,
    layer: int,
    alpha: float,
    config: RDOConfig | None = None,
    watch: Watch | None = None,
) -> LearnedDirection:
    """Descend on 1·CE(ablated, edit → edit target) + 0.2·CE(α r added, benign → refusal) + 1·KL(retain), r of length 1.

    initial  (d_model,), where the search begins: the DIM direction, of any length
    layer    the block at whose output α r is added, at all positions: where the DIM direction was read (block output l is
             block input l + 1)
    alpha    ‖r_DIM‖

    The edit target stands where the published method has the answer of the ablated model. The refusal that a benign prompt
    is to get is drawn from the base's own to edit prompts, up to its first full stop. Retained are the last positions of
    benign prompts with the base's answers, by KL(ablated ‖ base), summed over positions as the published code sums it;
    cross-entropies are means over tokens. The gradient is projected off r before each step, and r renormalised after it.
    The direction with the lowest loss on calibration prompts is returned. The same material and configuration give the
    same bits; the model is left frozen and without gradients.

    raises SteeringError for a direction or alpha that is none; FloatingPointError where loss or gradient are not finite
    """
    config = config or RDOConfig()
    backbone.check_layers((layer,), "GoR-RDO's addition")
    r = _unit(initial, backbone, alpha)
    train = _rows(backbone, material, SplitName.TRAIN, config)
    held = _rows(backbone, material, SplitName.CALIBRATION, config).first(config.check_rows)
    optimiser = torch.optim.AdamW([r], lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, amsgrad=True)
    objective = _Objective(backbone, layer, alpha, config)
    draw = random.Random(f"rdo/{material.seed}")
    streams = [_endless(rows, draw) for rows in (train.ablation, train.addition, train.retain)]

    losses: list[Loss] = []
    checks = [(0, _finite(objective.of(held, r), 0))]
    best, best_step, waited, reduced = r.detach().clone(), 0, 0, 0
    for step in range(1, config.steps + 1):
        drawn = _Rows(*([next(s) for _ in range(config.batch_size)] for s in streams))
        with torch.enable_grad():
            losses.append(objective.of(drawn, r, backward=True))
        _finite(losses[-1], step, r.grad)
        descend(r, optimiser)
        if watch is not None:
            watch(step, losses[-1])
        if step % config.check_every and step != config.steps:
            continue
        loss = _finite(objective.of(held, r), step)
        if loss.total < min(c.total for _, c in checks):
            best, best_step, waited = r.detach().clone(), step, 0
        else:
            waited += 1
        checks.append((step, loss))
        if waited >= config.patience:
            if reduced == config.reductions:
                break
            reduced, waited = reduced + 1, 0
            optimiser.param_groups[0]["lr"] /= 10
    return LearnedDirection(best.cpu(), best_step, tuple(losses), tuple(checks))


def descend(r: Tensor, optimiser: torch.optim.Optimizer) -> None:
    """One step on the unit sphere: the gradient loses its part along r, which only changes r's length."""
    with torch.no_grad():
        r.grad.sub_((r.grad @ r) * r)
        torch.nn.utils.clip_grad_norm_([r], 10.0)
        optimiser.step()
        optimiser.zero_grad()
        r.div_(r.norm())


@dataclass(frozen=True)
class _Rows:
    """Prompts with the continuations that the three parts of the loss force on them."""

    ablation: Sequence[Forced]
    addition: Sequence[Forced]
    retain: Sequence[Forced]

    def first(self, n: int) -> _Rows:
        return _Rows(self.ablation[:n], self.addition[:n], self.retain[:n])


def _rows(backbone: Backbone, material: Material, split: SplitName, config: RDOConfig) -> _Rows:
    edit = material.with_target(split)
    benign = [p for p in material.of(split, Bucket.BENIGN_KEEP) if material.answers.get(p.id)]
    refusals = [_first_sentence(backbone, material.answers[p.id]) for p in edit if material.answers.get(p.id)]
    if not benign or not refusals:
        raise SteeringError(
            f"GoR-RDO trains on the base's answers to benign keeps and on its refusals of edit prompts; the {split.value} "
            f"split has {len(benign)} and {len(refusals)} of them. Give Material.answers for both buckets."
        )
    # A string seeds by its digest, the same in every process; a tuple would not be taken at all.
    drawn = random.Random(f"rdo/{material.seed}/{split.value}").choices(refusals, k=len(benign))
    ids = {p.id: tuple(checked_ids(backbone, p, room=config.horizon)) for p in (*edit, *benign)}

    def forced(prompt, continuation: Sequence[int]) -> Forced:
        return Forced(prompt.id, prompt.bucket, ids[prompt.id], tuple(continuation)[: config.horizon])

    return _Rows(
        [forced(p, material.targets[p.id]) for p in edit],
        [forced(p, refusal) for p, refusal in zip(benign, drawn, strict=True)],
        # One token less: the distribution before the answer's first token counts, the one after its last does as well.
        [forced(p, material.answers[p.id][: config.horizon - 1]) for p in benign],
    )


def _first_sentence(backbone: Backbone, tokens: Sequence[int]) -> Sequence[int]:
    end = next((i for i, t in enumerate(tokens) if "." in backbone.tokenizer.decode([t])), len(tokens))
    return tokens[:end] or tokens


def _endless(rows: Sequence[Forced], draw: random.Random) -> Iterator[Forced]:
    """Every row once, in a drawn order, before any comes again."""
    while True:
        yield from draw.sample(rows, len(rows))


@dataclass(frozen=True)
class _Objective:
    backbone: Backbone
    layer: int
    alpha: float
    config: RDOConfig

    def of(self, rows: _Rows, r: Tensor, *, backward: bool = False) -> Loss:
        """The loss over these rows; with `backward`, its gradient is added to r.grad, micro-batch by micro-batch."""
        c = self.config
        parts = (
            (self.ablation, c.ablation_weight, rows.ablation),
            (self.addition, c.addition_weight, rows.addition),
            (self.retain, c.retain_weight, rows.retain),
        )
        means = [self._mean(part, weight, kind, r, backward) for part, weight, kind in parts]
        total = sum(weight * mean for (_, weight, _), mean in zip(parts, means, strict=True))
        return Loss(total, *means)

    def _mean(self, part: Callable, weight: float, rows: Sequence[Forced], r: Tensor, backward: bool) -> float:
        found = 0.0
        for start in range(0, len(rows), self.config.micro_batch):
            chunk = rows[start : start + self.config.micro_batch]
            with torch.set_grad_enabled(backward and weight > 0):
                loss = part(chunk, r) * (len(chunk) / len(rows))
            if loss.requires_grad:
                (weight * loss).backward()
            found += loss.item()
        return found

    def ablation(self, rows: Sequence[Forced], r: Tensor) -> Tensor:
        with edit_stream(self.backbone, lambda: _everywhere(ablating(r))):
            return self._cross_entropy(rows)

    def addition(self, rows: Sequence[Forced], r: Tensor) -> Tensor:
        with edit_residuals(self.backbone, {self.layer: _everywhere(adding(self.alpha * r))}):
            return self._cross_entropy(rows)

    def retain(self, rows: Sequence[Forced], r: Tensor) -> Tensor:
        with torch.no_grad():
            base, mask = self._last_log_probs(rows)
        with edit_stream(self.backbone, lambda: _everywhere(ablating(r))):
            ablated, _ = self._last_log_probs(rows)
        kl = F.kl_div(base, ablated, reduction="none", log_target=True).sum(-1)
        return (kl * mask).sum(1).mean()

    def _cross_entropy(self, rows: Sequence[Forced]) -> Tensor:
        tokens, mask = pad_right([row.continuation for row in rows], self.backbone.pad_id, self.backbone.device)
        return cross_entropy(teacher_forced_logits(self.backbone, forced_batch(self.backbone, rows), tokens), tokens, mask)

    def _last_log_probs(self, rows: Sequence[Forced]) -> tuple[Tensor, Tensor]:
        """(n, horizon, vocab) float32 over the last positions of prompt and answer, and their mask (n, horizon)."""
        ids, mask = pad_left(self.backbone, [(*row.prompt_ids, *row.continuation) for row in rows])
        batch = PromptBatch(ids, mask, tuple(row.id for row in rows), (None,) * len(rows))
        with contiguous_head_input(self.backbone):
            logits = self.backbone.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=self.config.horizon,
            ).logits
        return logits.float().log_softmax(-1), mask[:, -self.config.horizon :]


def _everywhere(change: Change) -> Edit:
    # Not row_edit: every row and column is edited, and indexed writes would cost memory in the backward pass.
    return lambda x: x + change(x.float()).to(x.dtype)


def _unit(initial: Tensor, backbone: Backbone, alpha: float) -> Tensor:
    length = initial.double().norm().item()
    if initial.shape != (backbone.d_model,) or not math.isfinite(length) or not length:
        raise SteeringError(
            f"GoR-RDO begins at a direction of shape {tuple(initial.shape)} and length {length}; it needs "
            f"({backbone.d_model},), finite and not zero. Hand in the DIM direction of this model."
        )
    if not math.isfinite(alpha) or alpha <= 0:
        raise SteeringError(f"alpha is {alpha}; it must be above 0 and finite. It is the length of the DIM direction.")
    r = initial.detach().to(backbone.device, torch.float32, copy=True)
    return r.div_(r.norm()).requires_grad_(True)


def _finite(loss: Loss, step: int, gradient: Tensor | None = None) -> Loss:
    if not math.isfinite(loss.total) or (gradient is not None and not bool(torch.isfinite(gradient).all())):
        raise FloatingPointError(
            f"GoR-RDO's loss is {loss.total} at step {step}, or its gradient is not finite. Lower the learning rate, or "
            "load the model in float32."
        )
    return loss
