"""From split prompts to training rows: base-refusal filter, edit targets, base traces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from paving.backbone import Backbone, checked_ids, render_batch
from paving.controller.config import ControllerConfig
from paving.controller.residual_paving import boundary_features
from paving.generation import Completion
from paving.prompts.splits import restrict
from paving.prompts.types import Bucket, Prompt, SplitName, Splits
from paving.traces.base import BaseTraces, Forced
from paving.traces.completions import as_completions, base_continuations
from paving.traces.store import TraceStore
from paving.traces.targets import (
    EditTarget,
    own_targets,
    reference_targets,
    reframe_targets,
)
from paving.traces.top_k import TopK
from paving.training.checkpoint import TrainingError
from paving.training.config import TrainingConfig
from paving.training.data import TrainingRows
from paving.training.verdicts import LabelsOf, base_refused, usable_target

Stage = Callable[[str, int], Callable[[int], None]]  # (what, how many) -> tick


def silent(_what: str, _total: int) -> Callable[[int], None]:
    return lambda _n: None


@dataclass(frozen=True)
class Prepared:
    """Splits after the filters, the training rows, targets of train and calibration edit prompts, and their traces."""

    splits: Splits
    rows: TrainingRows
    calibration_targets: dict[str, EditTarget]
    traces: BaseTraces


def filter_base_refused(
    backbone: Backbone,
    store: TraceStore,
    splits: Splits,
    labels_of: LabelsOf,
    *,
    max_new_tokens: int,
    stage: Stage = silent,
) -> Splits:
    """Drop edit prompts that the base does not refuse, in every split (B.3).

    raises TrainingError where no edit prompt of a split is refused.
    """
    edit = [p for s in SplitName for p in splits.of(s, Bucket.EDIT)]
    continuations = base_continuations(
        backbone, store, edit, max_new_tokens, tick=stage("base answers (refusal filter)", len(edit))
    )
    refused = base_refused(as_completions(backbone, edit, continuations), labels_of)
    filtered = restrict(splits, lambda p: p.bucket != Bucket.EDIT or p.id in refused, "base refuses (edit prompts)")
    for name in SplitName:
        if splits.of(name, Bucket.EDIT) and not filtered.of(name, Bucket.EDIT):
            raise TrainingError(
                f"{backbone.name} refuses none of the {len(splits.of(name, Bucket.EDIT))} edit prompts of the "
                f"{name.value} split, so there is nothing to edit. Use prompts it refuses, or a cautious model "
                "(paving organism build)."
            )
    return filtered


def prepare(
    backbone: Backbone,
    store: TraceStore,
    splits: Splits,
    config: TrainingConfig,
    labels_of: LabelsOf,
    *,
    reference: Backbone | None = None,
    stage: Stage = silent,
) -> Prepared:
    """Targets and traces for already filtered splits. `reference` answers edit prompts where config.targets asks.

    Training edit prompts with an unusable target are dropped, and counted: the edit must not learn to refuse, to loop, or
    to help harm. labels_of: of targets as completions.
    """
    asked = [p for s in (SplitName.TRAIN, SplitName.CALIBRATION) for p in splits.of(s, Bucket.EDIT)]
    targets = edit_targets(backbone, store, asked, config, reference, stage)
    usable = usable_targets(backbone, asked, targets, labels_of)
    calibration_edit = splits.of(SplitName.CALIBRATION, Bucket.EDIT)
    splits = drop_from_training(splits, usable)
    train = splits.of(SplitName.TRAIN)
    edit = [p for p in train if p.bucket == Bucket.EDIT]
    keeps = [p for p in train if p.bucket != Bucket.EDIT]
    continuations = base_continuations(
        backbone, store, keeps, config.horizon, tick=stage("base continuations (keeps)", len(keeps))
    )
    edit_rows = [_forced(backbone, p, targets[p.id].continuation) for p in edit]
    keep_rows = [_forced(backbone, p, continuations[p.id]) for p in keeps]
    teacher = {r.id: Forced(f"{r.id}/teacher", Bucket.EDIT, targets[r.id].teacher_ids, r.continuation) for r in edit_rows}
    traces = BaseTraces(backbone, store, k=config.top_k)
    traces.build(edit_rows, with_resid=True, tick=stage("base traces (edit)", len(edit_rows)))
    traces.build(list(teacher.values()), with_resid=True, tick=stage("teacher traces", len(teacher)))
    traces.build(keep_rows, tick=stage("base traces (keeps)", len(keep_rows)))
    rows = TrainingRows(
        edit=tuple(edit_rows),
        benign_keep=tuple(r for r in keep_rows if r.bucket == Bucket.BENIGN_KEEP),
        harmful_keep=tuple(r for r in keep_rows if r.bucket == Bucket.HARMFUL_KEEP),
        targets=targets,
        teacher=teacher,
        p_edit=reference_distributions(reference, store, edit, edit_rows, targets, config, stage),
    )
    return Prepared(splits, rows, {p.id: targets[p.id] for p in calibration_edit}, traces)


def usable_targets(
    backbone: Backbone, prompts: Sequence[Prompt], targets: Mapping[str, EditTarget], labels_of: LabelsOf
) -> set[str]:
    """Ids of the prompts whose target neither refuses nor loops nor helps harm."""
    labels = labels_of([_as_answer(backbone, p, targets[p.id]) for p in prompts])
    return {
        p.id
        for p, label in zip(prompts, labels, strict=True)
        if usable_target(label, targets[p.id].kind) and not repeats(targets[p.id].continuation)
    }


def repeats(tokens: Sequence[int], span: int = 6) -> bool:
    """Whether some `span` tokens in a row occur twice: an answer on its way into a loop, too short yet to be called one."""
    seen: set[tuple[int, ...]] = set()
    for i in range(len(tokens) - span + 1):
        window = tuple(tokens[i : i + span])
        if window in seen:
            return True
        seen.add(window)
    return False


def drop_from_training(splits: Splits, usable: set[str]) -> Splits:
    """raises TrainingError where no training edit prompt has a usable target."""
    training = {p.id for p in splits.of(SplitName.TRAIN, Bucket.EDIT)}
    kept = restrict(splits, lambda p: p.id not in training or p.id in usable, "target can be used (training edit prompts)")
    if not kept.of(SplitName.TRAIN, Bucket.EDIT):
        raise TrainingError(
            f"the targets of all {len(training)} training edit prompts refuse, loop or break off, so there is nothing to "
            "learn from. Give answers in a `target` field (--targets own) or take them from a model that answers "
            "(--targets-from)."
        )
    return kept


def _as_answer(backbone: Backbone, prompt: Prompt, target: EditTarget) -> Completion:
    text = backbone.tokenizer.decode(target.continuation, skip_special_tokens=True)
    cut = target.continuation[-1] not in backbone.eos_ids
    return Completion(prompt.id, prompt.bucket.value, prompt.transcript, text, len(target.continuation), cut, gate=0.0)


def edit_targets(
    backbone: Backbone,
    store: TraceStore,
    prompts: Sequence[Prompt],
    config: TrainingConfig,
    reference: Backbone | None,
    stage: Stage,
) -> dict[str, EditTarget]:
    match config.targets:
        case "own":
            return own_targets(backbone, prompts, horizon=config.horizon)
        case "reference":
            if reference is None:
                raise ValueError("targets from a reference model need that model: --targets-from MODEL.")
            tick = stage(f"answers of {reference.name}", len(prompts))
            answers = base_continuations(reference, store, prompts, config.horizon, tick=tick)
            return reference_targets(backbone, prompts, as_completions(reference, prompts, answers), horizon=config.horizon)
        case _:
            tick = stage("safe-reframe targets", len(prompts))
            return reframe_targets(backbone, store, prompts, horizon=config.horizon, tick=tick)


def reference_distributions(
    reference: Backbone | None,
    store: TraceStore,
    edit: Sequence[Prompt],
    rows: Sequence[Forced],
    targets: dict[str, EditTarget],
    config: TrainingConfig,
    stage: Stage,
) -> dict[str, TopK]:
    """p^E from the reference model itself, along its own answer; only where the two models share a vocabulary."""
    if reference is None or config.targets != "reference":
        return {}
    forced = [
        Forced(r.id, Bucket.EDIT, tuple(checked_ids(reference, p)), r.continuation)
        for p, r in zip(edit, rows, strict=True)
        if targets[p.id].kind == "reference"
    ]
    traces = BaseTraces(reference, store, k=config.top_k)
    traces.build(forced, tick=stage(f"distributions of {reference.name}", len(forced)))
    return {r.id: traces.read(r).top for r in forced}


def check_reference(backbone: Backbone, reference: Backbone) -> None:
    """raises ValueError unless the two models write the same token ids (p^E is a distribution over tokens)."""
    if backbone.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise ValueError(
            f"{reference.name} has another vocabulary than {backbone.name}, so its distributions cannot be targets. "
            "Use a reference model of the same family, or put its answers into the rows' `target` field."
        )


def _forced(backbone: Backbone, prompt: Prompt, continuation: tuple[int, ...]) -> Forced:
    return Forced(prompt.id, prompt.bucket, tuple(checked_ids(backbone, prompt)), continuation)


def boundary_matrix(
    backbone: Backbone, prompts: Sequence[Prompt], config: ControllerConfig, *, batch_size: int = 32
) -> torch.Tensor:
    """(n, n_features) float32 boundary features of any prompts, without traces; rows follow `prompts`."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].transcript), prompts[i].id))
    rows: dict[int, torch.Tensor] = {}
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        z = boundary_features(backbone, render_batch(backbone, [prompts[i] for i in index]), config)
        rows.update(zip(index, z, strict=True))
    if not rows:
        return torch.zeros((0, config.n_features(backbone.d_model)), device=backbone.device)
    return torch.stack([rows[i] for i in range(len(prompts))])
