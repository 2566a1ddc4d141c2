"""The staged fit of a controller on cached traces (Residual Paving, section 3.3): gate, contrastive, 1, 2, 3."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from paving.backbone import Backbone
from paving.backbone.attention import few_query_attention
from paving.backbone.hooks import edit_residuals, record_residuals
from paving.controller.residual_paving import ResidualPaving
from paving.processes import from_first, rank_and_world, shared, sum_gradients, summed
from paving.prompts.types import Bucket
from paving.traces.base import BaseTraces, Forced
from paving.traces.forward import teacher_forced_logits
from paving.traces.top_k import TopK, kl_from_top_k
from paving.training import losses
from paving.training.checkpoint import TrainingError, identity, load_checkpoint, save_checkpoint
from paving.training.config import TrainingConfig
from paving.training.data import Boundary, StepBatch, TrainingRows, boundary_of, epoch_steps, step_batch
from paving.training.veto import fit_veto


@dataclass(frozen=True)
class EpochRecord:
    stage: str
    epoch: int
    losses: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Stage:
    """One stage of the schedule. trains: which parts move; horizon: forced steps; anchor: contrastive warm-up."""

    name: str
    epochs: int
    horizon: int
    optimiser: str
    anchor: bool = False


MEND = "Lower the learning rate or the training scale, or load the model in float32."
TERMS = ("ce", "benign preservation", "kl", "trajectory", "harmful preservation", "gate", "margin", "l2")
Watch = Callable[[str, int, int, dict[str, float]], None]  # stage, step, steps in this epoch, running means


def fit(
    backbone: Backbone,
    controller: ResidualPaving,
    traces: BaseTraces,
    rows: TrainingRows,
    config: TrainingConfig,
    folder: Path,
    watch: Watch = lambda *_: None,
) -> list[EpochRecord]:
    """Fit `controller.weights` in place; returns one record an epoch.

    After every epoch a checkpoint is written to `folder`. Called again with the same arguments after a kill, it goes
    on from the last finished epoch and ends with the same weights.

    raises TrainingError on a loss that is not finite (the last finished epoch's weights stay in `folder` and in
    `controller`), or if `folder` holds a checkpoint of another run.
    """
    weights = controller.weights.train().requires_grad_(True)
    boundary = boundary_of(traces, rows.all(), controller.config, backbone.device)
    standardise(weights.router, boundary.z)
    set_residual_sizes(weights.experts, traces, rows)
    router, experts = list(weights.router.parameters()), list(weights.experts.parameters())
    optimisers: dict[str, torch.optim.Optimizer] = {
        "gate": torch.optim.Adam(router, lr=config.gate_learning_rate),
        "contrastive": torch.optim.Adam(experts + router, lr=config.contrastive_learning_rate),
        "fit": torch.optim.Adam(experts + router, lr=config.learning_rate),
        "routing": torch.optim.Adam(router, lr=config.learning_rate),
    }
    run = identity(
        training=config.model_dump(mode="json"),
        controller=controller.config.model_dump(mode="json"),
        base=controller.base_fingerprint,
        rows=[(r.id, r.prompt_ids, r.continuation) for r in rows.all()],
    )
    done = load_checkpoint(folder, weights, optimisers, run)
    finished_weights = _copy(weights)
    records = [EpochRecord(**r) for r in done["records"]] if done else []
    finished = {(r.stage, r.epoch) for r in records}
    for stage in schedule(config):
        for epoch in range(1, stage.epochs + 1):
            if (stage.name, epoch) in finished:
                continue
            started = time.perf_counter()
            seed = f"{config.seed}/{stage.name}/{epoch}"
            try:
                if stage.name == "gate":
                    means = gate_epoch(weights.router, boundary, optimisers["gate"], config, seed, watch)
                else:
                    optimiser = optimisers[stage.optimiser]
                    means = edit_epoch(backbone, controller, traces, rows, boundary, optimiser, stage, config, seed, watch)
                from_first(list(weights.state_dict().values()))  # the same everywhere to the last bit
                check_weights(weights, stage.name)
            except TrainingError as error:
                weights.load_state_dict(finished_weights)
                weights.eval().requires_grad_(False)
                kept = f" The last finished epoch is kept in {folder}." if records else ""
                raise TrainingError(f"{error}{kept} {MEND}") from None
            records.append(EpochRecord(stage.name, epoch, means, time.perf_counter() - started))
            save_checkpoint(folder, weights, optimisers, {"run": run, "records": [vars(r) for r in records]})
            finished_weights = _copy(weights)
    fit_veto(weights, boundary, l2=config.veto_l2)
    weights.eval().requires_grad_(False)
    (folder / "history.json").write_text(json.dumps([vars(r) for r in records], indent=1), encoding="utf-8")
    return records


def schedule(config: TrainingConfig) -> tuple[Stage, ...]:
    first, second, third = config.stage_epochs
    return (
        Stage("gate", config.gate_epochs, 0, "gate"),
        Stage("contrastive", config.contrastive_epochs, config.horizon, "contrastive", anchor=True),
        Stage("stage 1", first, config.short_horizon, "fit"),
        Stage("stage 2", second, config.horizon, "fit"),
        # Stage 3 refines the route on the fitted experts, which no longer move.
        Stage("stage 3", third, config.horizon, "routing"),
    )


def gate_epoch(
    router: nn.Module,
    boundary: Boundary,
    optimiser: torch.optim.Optimizer,
    config: TrainingConfig,
    seed: str,
    watch: Watch,
) -> dict[str, float]:
    """Gate pre-training: weighted BCE on cached boundary states, every prompt once."""
    generator = torch.Generator().manual_seed(int(identity(seed=seed), 16) % 2**31)
    order = torch.randperm(len(boundary.z), generator=generator)
    totals: list[float] = []
    batches = order.split(config.gate_batch)
    for step, index in enumerate(batches, 1):
        logits, _ = router(boundary.z[index])
        loss = losses.gate_bce(logits, boundary.is_edit[index], balance=True)
        loss = loss + config.weights.l2 * sum(p.pow(2).sum() for p in router.parameters())
        check_loss({"gate": loss.item()}, "gate", step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        totals.append(loss.item())
        watch("gate", step, len(batches), {"gate": sum(totals) / len(totals)})
    return {"gate": sum(totals) / len(totals)}


def edit_epoch(
    backbone: Backbone,
    controller: ResidualPaving,
    traces: BaseTraces,
    rows: TrainingRows,
    boundary: Boundary,
    optimiser: torch.optim.Optimizer,
    stage: Stage,
    config: TrainingConfig,
    seed: str,
    watch: Watch,
) -> dict[str, float]:
    """One epoch of any stage after the gate's."""
    steps = list(epoch_steps(rows, config.rows_per_step, seed))
    sums: dict[str, float] = {}
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for step, chosen in enumerate(steps, 1):
        mine = share_of_step(chosen)
        optimiser.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        if mine:
            batch = step_batch(backbone, traces, rows, mine, stage.horizon, controller.config, anchor_only=stage.anchor)
            terms = step_losses(backbone, controller, batch, boundary.harmful, config, anchor=stage.anchor)
            terms = {name: term * weight_of(name, mine, chosen) for name, term in terms.items()}
        values = added_up(terms)
        check_loss(values, stage.name, step)
        if terms:
            torch.stack(list(terms.values())).sum().backward()
        sum_gradients(parameters)
        optimiser.step()
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value
        watch(stage.name, step, len(steps), {k: v / step for k, v in sums.items()})
    return {k: v / len(steps) for k, v in sums.items()}


def share_of_step(chosen: Sequence[Forced]) -> list[Forced]:
    """This process's rows of a step, of each bucket its share; all of them for a process by itself."""
    return [row for bucket in Bucket for row in shared([r for r in chosen if r.bucket == bucket])]


def weight_of(term: str, mine: Sequence[Forced], chosen: Sequence[Forced]) -> float:
    """What a term's mean over `mine` counts in its mean over all rows of the step. Terms are means over one bucket's rows;
    that of the gate is one over all of them, and the weights' own is everybody's."""
    if len(mine) == len(chosen):
        return 1.0
    over = {"benign preservation": Bucket.BENIGN_KEEP, "harmful preservation": Bucket.HARMFUL_KEEP, "gate": None}
    if term == "l2":
        return 1.0 / sharing(chosen)
    bucket = over.get(term, Bucket.EDIT)
    mine_of, all_of = (sum(bucket in (None, r.bucket) for r in each) for each in (mine, chosen))
    return mine_of / all_of


def sharing(chosen: Sequence[Forced]) -> int:
    """How many processes have rows of a step."""
    most = max(sum(r.bucket == bucket for r in chosen) for bucket in Bucket)
    return min(rank_and_world()[1], most)


def added_up(terms: Mapping[str, Tensor]) -> dict[str, float]:
    """Every term of the step over all processes; those that none has are left out."""
    names = [n for n in TERMS if n in terms] if rank_and_world()[1] == 1 else list(TERMS)
    there = summed([float(name in terms) for name in names])
    values = summed([terms[name].item() if name in terms else 0.0 for name in names])
    return {name: value for name, value, n in zip(names, values, there, strict=True) if n}


def check_loss(terms: Mapping[str, float], stage: str, step: int) -> None:
    """raises TrainingError naming the terms, before a loss that is not finite reaches the weights."""
    total = sum(terms.values())
    if not math.isfinite(total):
        parts = ", ".join(f"{name} {value:.3g}" for name, value in terms.items())
        raise TrainingError(f"the loss is {total} in {stage}, step {step} ({parts}).")


def check_weights(weights: nn.Module, stage: str) -> None:
    """A finite loss can have a gradient that is not; after an epoch's last step no further loss would tell."""
    broken = [name for name, p in weights.named_parameters() if not bool(torch.isfinite(p).all())]
    if broken:
        raise TrainingError(f"weights are no longer finite after {stage} ({', '.join(broken)}).")


def step_losses(
    backbone: Backbone,
    controller: ResidualPaving,
    batch: StepBatch,
    harmful_z: Tensor,
    config: TrainingConfig,
    *,
    anchor: bool,
) -> dict[str, Tensor]:
    """Every term of eqs. 4 and 5, already weighted. Runs the last prompt token and the forced tokens only.

    The gate is the soft one and carries gradient to the router: experts and route are fitted together, as deployed.
    """
    w, weights = config.weights, controller.weights
    logit, mixture = weights.router(batch.z)
    strength = config.train_scale * torch.sigmoid(logit)[:, None] * controller.mixture.mix(mixture)
    edits = weights.experts.edits(strength, backbone.dtype)
    n_edit, n_benign = batch.n_edit, batch.n_benign
    want_states = not anchor and w.trajectory > 0 and n_edit > 0
    layers = controller.config.edit_layers if want_states else ()
    n_steps = batch.tokens.shape[1]  # without a prompt cache the pass covers the prompt too, which no loss looks at

    def forced(resid: Tensor) -> Tensor:
        return resid[:n_edit, -n_steps:]

    attention = few_query_attention(backbone) if batch.cache is not None else nullcontext()
    with attention, edit_residuals(backbone, edits), record_residuals(backbone, layers, keep=forced) as states:
        logits = teacher_forced_logits(backbone, batch.prompts, batch.tokens, cache=batch.cache)

    edit, benign, harmful = slice(0, n_edit), slice(n_edit, n_edit + n_benign), slice(n_edit + n_benign, None)
    terms: dict[str, Tensor] = {}
    if n_edit:
        terms["ce"] = w.ce * losses.cross_entropy(logits[edit], batch.tokens[edit], batch.mask[edit])
    if n_benign:
        terms["benign preservation"] = w.preservation * _kl(batch, logits, benign)
    if anchor:
        return terms
    if n_edit:
        terms["kl"] = w.kl * _kl(batch, logits, edit)
        if want_states:
            edited = torch.stack([states[layer] for layer in layers], dim=1).float()
            terms["trajectory"] = w.trajectory * losses.trajectory(edited, batch.base, batch.target, batch.mask[edit])
    if len(logit) > n_edit + n_benign:
        terms["harmful preservation"] = w.preservation * w.harmful_preservation * _kl(batch, logits, harmful)
    is_edit = torch.zeros_like(logit)
    is_edit[edit] = 1.0
    terms["gate"] = w.gate * losses.gate_bce(logit, is_edit, balance=False)
    if n_edit and len(harmful_z):
        hard, _ = weights.router(harmful_z)
        terms["margin"] = w.harmful_margin * losses.harmful_margin(logit[edit], hard, config.hard_negatives, config.margin)
    parameters = [p for part in (weights.router, weights.experts) for p in part.parameters()]
    terms["l2"] = w.l2 * torch.stack([p.pow(2).sum() for p in parameters]).sum()
    return terms


def _kl(batch: StepBatch, logits: Tensor, rows: slice) -> Tensor:
    top = TopK(batch.top.log_probs[rows], batch.top.ids[rows])
    return kl_from_top_k(top, logits[rows], batch.mask[rows]).mean()


def _copy(weights: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in weights.state_dict().items()}


def standardise(router: nn.Module, z: Tensor) -> None:
    """Fix the router's input statistics from the training rows (labels are not used)."""
    router.mean.copy_(z.mean(0))
    router.std.copy_(z.std(0).clamp_min(1e-4))


def set_residual_sizes(experts: nn.Module, traces: BaseTraces, rows: TrainingRows) -> None:
    """rms_l: the base's mean residual size at each edited layer, at the positions that are edited."""
    squares = [
        traces.read(r, with_resid=True).resid[list(experts.layers)].float().pow(2).mean(dim=(1, 2))
        for r in rows.of(Bucket.EDIT)
    ]
    experts.rms.copy_(torch.stack(squares).mean(0).sqrt().clamp_min(1e-4))
