"""`paving diagnose RUN`: why a run's numbers are what they are. Reads a finished run; decodes one further row, all open."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from paving.backbone import Backbone, render_batch
from paving.backbone.hooks import record_residuals
from paving.controller.gates import AlwaysOpen
from paving.controller.residual_paving import ResidualPaving
from paving.controller.store import load_controller
from paving.evaluation.diagnostics.corruption import Outcome, corrupted_curve
from paving.evaluation.diagnostics.lateness import late_refusals
from paving.evaluation.diagnostics.records import (
    Diagnostics,
    corruption_records,
    late_records,
    probe_records,
    trajectory_record,
)
from paving.evaluation.diagnostics.separability import layer_probes
from paving.evaluation.diagnostics.trajectory import alignments, base_path_rms
from paving.evaluation.judges import Judge, RuleJudge
from paving.evaluation.three_way import KEEPS, Protocol, RowSpec, completions_of
from paving.generation import load_completions
from paving.prompts.types import Bucket, Prompt, SplitName
from paving.run import Means, filtered, refused_by, report, row_specs, split_of
from paving.run_folder import RunConfig, RunError, read_config, write_text
from paving.traces.completions import base_continuations
from paving.traces.preservation import keep_divergence
from paving.traces.store import TraceStore
from paving.training.prepare import edit_targets

FILE = "diagnostics.json"


def diagnose(folder: Path, means: Means, judge: Judge | None = None) -> Diagnostics:
    """Measure, write diagnostics.json, and write the report again with it. raises RunError for an unevaluated run."""
    judge = judge or RuleJudge()
    config = read_config(folder)
    if not (folder / "metrics.json").exists():
        raise RunError(f"{folder} has no metrics.json yet. Evaluate it first: paving eval {folder}")
    backbone = means.load(config.model, config.dtype)
    store = means.store()
    controller = load_controller(folder / "controller", backbone)
    splits = filtered(split_of(config), config, backbone, store, folder, judge, means)
    held_out = splits.of(SplitName.HELD_OUT)
    corruption, sentence = corruption_records(
        corrupted_curve(outcomes(backbone, controller, held_out, config, store, folder, judge, means))
    )
    found = Diagnostics(
        run=folder.name,
        judge=judge.name,
        corruption=corruption,
        corruption_conclusion=sentence,
        trajectory=trajectory(backbone, controller, held_out, config, store, means),
        probes=probe_records(probes(backbone, splits.of(SplitName.TRAIN), means)),
        probe_prompts={b.value: len(splits.of(SplitName.TRAIN, b)) for b in Bucket},
        late=late(backbone, folder, judge),
    )
    write_text(folder / FILE, found.model_dump_json(indent=1))
    report(folder)
    return found


def outcomes(
    backbone: Backbone,
    controller: ResidualPaving,
    prompts: Sequence[Prompt],
    config: RunConfig,
    store: TraceStore,
    folder: Path,
    judge: Judge,
    means: Means,
) -> list[Outcome]:
    """Every held-out prompt with its gate closed (the base's own row) and open (decoded once, then kept)."""
    opened = controller.with_policy(AlwaysOpen(), name="open")
    protocol = Protocol(config.decoding, judge, horizon=config.training.horizon, k=config.training.top_k)
    spec = next((s for s in row_specs(controller, ["open"], folder) if s.policy == "open"), None)
    if spec is None:  # a controller that is itself always open has no row of that name to add
        spec = RowSpec(opened, "diagnostic", "open", controller.scale, f"open/{controller.scale}")
    answers = completions_of(backbone, prompts, spec, protocol, folder, (), means.stage)
    base = load_completions(folder / "completions" / "base.jsonl")
    is_refusal = refused_by(judge)
    refused_open = {c.id: is_refusal(c) for c in answers}
    refused_closed = {c.id: is_refusal(c) for c in base}
    keeps = [p for p in prompts if p.bucket in KEEPS]
    continuations = base_continuations(backbone, store, keeps, protocol.horizon)
    divergence = keep_divergence(backbone, keeps, continuations, opened, k=protocol.k)
    return [Outcome(p.id, p.bucket, refused_closed[p.id], refused_open[p.id], divergence.get(p.id)) for p in prompts]


def trajectory(
    backbone: Backbone,
    controller: ResidualPaving,
    prompts: Sequence[Prompt],
    config: RunConfig,
    store: TraceStore,
    means: Means,
):
    """Table 4's figures for the deployed gate, on held-out prompts."""
    training = config.training
    reference = None
    if config.targets_from is not None:
        training = training.model_copy(update={"targets": "reference"})
        reference = means.load(config.targets_from, config.dtype)
    edit = [p for p in prompts if p.bucket == Bucket.EDIT]
    targets = edit_targets(backbone, store, edit, training, reference, means.stage)
    refusals = base_continuations(backbone, store, edit, training.horizon)
    long_enough = [p for p in edit if min(len(targets[p.id].continuation), len(refusals[p.id])) >= 2]
    layers = controller.config.edit_layers
    tick = means.stage("trajectories", len(long_enough))
    found = alignments(backbone, long_enough, targets, refusals, controller, layers, tick=tick)
    path_rms: Mapping[str, list[float]] = {
        bucket.value: list(
            base_path_rms(
                backbone,
                chosen := [p for p in prompts if p.bucket == bucket],
                base_continuations(backbone, store, chosen, training.horizon),
                controller,
                layers,
            ).values()
        )
        for bucket in Bucket
    }
    return trajectory_record(controller.policy.name, found, layers, path_rms)


@torch.no_grad()
def probes(backbone: Backbone, prompts: Sequence[Prompt], means: Means, batch_size: int = 16):
    """A probe a layer on the last prompt token's state, cross-validated on the training prompts."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].text), prompts[i].id))
    layers = range(backbone.n_layers)
    states = np.zeros((len(prompts), backbone.n_layers, backbone.d_model), dtype=np.float32)
    tick = means.stage("prompt states (every layer)", len(prompts))
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        batch = render_batch(backbone, [prompts[i] for i in index])
        with record_residuals(backbone, layers, keep=lambda resid: resid[:, -1].float().cpu()) as seen:
            backbone.model.get_decoder()(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )
        states[index] = torch.stack([seen[layer] for layer in layers], dim=1).numpy()
        tick(len(index))
    return layer_probes(prompts, states, layers)


def late(backbone: Backbone, folder: Path, judge: Judge):
    """Late refusals of every row and bucket, from the saved completions."""
    tokenizer = backbone.tokenizer

    def cut(text: str, n: int) -> str:
        return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:n], skip_special_tokens=True)

    records = []
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    for row in metrics["rows"]:
        completions = load_completions(folder / "completions" / f"{row['name']}.jsonl")
        for bucket in Bucket:
            chosen = [c for c in completions if c.bucket == bucket]
            records += late_records(row["name"], bucket.value, late_refusals(chosen, judge, cut))
    return records
