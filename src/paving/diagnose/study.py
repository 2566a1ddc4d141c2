"""What all parts of a diagnosis share: the run, its model and prompts, and what was computed once for all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from paving.backbone import Backbone
from paving.controller.residual_paving import ResidualPaving
from paving.controller.store import load_controller
from paving.diagnose.decided import Decided
from paving.evaluation.diagnostics.answers import AnswerJournal
from paving.evaluation.diagnostics.records import Diagnostics
from paving.evaluation.judges import Exchange, Judge, Label, judge_all
from paving.evaluation.results import Metrics
from paving.evaluation.three_way import HORIZON
from paving.evaluation.verdicts import read_verdicts, verdict_key
from paving.generation import Completion, load_completions
from paving.prompts.types import Bucket, Prompt, SplitName
from paving.run import Means
from paving.run_folder import RunConfig, RunError, read_config
from paving.run_splits import recorded_split
from paving.traces.completions import base_continuations
from paving.traces.prompt_states import PromptStates, prompt_states
from paving.traces.store import TraceStore
from paving.traces.targets import EditTarget
from paving.training.config import TrainingConfig
from paving.training.prepare import edit_targets

FILE = "diagnostics.json"
ANSWERS = Path("diagnostics") / "answers.jsonl"


@dataclass(frozen=True)
class Study:
    """A finished run, opened for measuring. Prompts are the held-out ones unless a name says otherwise.

    train    training prompts that the controller was fitted on
    base     prompt id -> the untouched base's own answer, as the run saved it
    """

    folder: Path
    config: RunConfig
    metrics: Metrics
    backbone: Backbone
    store: TraceStore
    controller: ResidualPaving
    prompts: tuple[Prompt, ...]
    train: tuple[Prompt, ...]
    base: Mapping[str, Completion]
    judge: Judge
    means: Means

    def of(self, bucket: Bucket) -> list[Prompt]:
        return [p for p in self.prompts if p.bucket == bucket]

    @cached_property
    def states(self) -> dict[str, PromptStates]:
        """Every block's state of every held-out and training prompt."""
        both = (*self.prompts, *self.train)
        return prompt_states(self.backbone, self.store, both, tick=self.means.stage("prompt states", len(both)))

    @cached_property
    def features(self) -> dict[str, Tensor]:
        """The router's input of every held-out and training prompt."""
        config = self.controller.config
        return {i: s.features(config.route_layers, config.pooling) for i, s in self.states.items()}

    def decided(self, controller: ResidualPaving) -> Decided:
        return Decided(controller, self.features)

    @cached_property
    def journal(self) -> AnswerJournal:
        return AnswerJournal(self.folder / ANSWERS)

    @cached_property
    def continuations(self) -> dict[str, tuple[int, ...]]:
        """The base's own continuations of all prompts, as long as the preservation score looks."""
        tick = self.means.stage("base continuations", len(self.prompts))
        return base_continuations(self.backbone, self.store, self.prompts, HORIZON, tick=tick)

    @cached_property
    def trace_targets(self) -> dict[str, EditTarget]:
        """Edit targets of the edit prompts, made as those of the training prompts and as long."""
        return self._targets(self.config.training.horizon)

    @cached_property
    def answer_targets(self) -> dict[str, EditTarget]:
        """The same, as long as an answer may be: what a whole answer is compared with."""
        return self._targets(max(self.config.decoding.max_new_tokens, self.config.training.horizon))

    def _targets(self, n_tokens: int) -> dict[str, EditTarget]:
        asked = self.training.model_copy(update={"horizon": n_tokens})
        edit = self.of(Bucket.EDIT)
        return edit_targets(self.backbone, self.store, edit, asked, self.reference, self.means.stage)

    @cached_property
    def training(self) -> TrainingConfig:
        training = self.config.training
        return training if self.config.targets_from is None else training.model_copy(update={"targets": "reference"})

    @cached_property
    def reference(self) -> Backbone | None:
        """The model whose answers are the targets, loaded once; None where the run has none."""
        name = self.config.targets_from
        return None if name is None else self.means.load(name, self.config.dtype)

    def label(self, c: Completion) -> Label:
        """What this judge said of the same text in the evaluation, or says now; asked once for each text."""
        asked = Exchange(c.prompt, c.response, Bucket(c.bucket), c.truncated)
        key = verdict_key(self.judge.name, asked)
        if key not in self._labels:
            self._labels[key] = judge_all(self.judge, [asked])[0].label
        return self._labels[key]

    @cached_property
    def _labels(self) -> dict[str, Label]:
        files = sorted((self.folder / "verdicts").glob("*.jsonl"))
        return {v.key: v.label for file in files for v in read_verdicts(file) if v.key and v.judge == self.judge.name}

    def row_completions(self, row: str) -> list[Completion]:
        path = self.folder / "completions" / f"{row}.jsonl"
        if not path.exists():
            raise RunError(f"{path} is missing. Evaluate again: paving eval {self.folder}")
        return load_completions(path)

    def key(self, **content: object) -> str:
        """A name for what was made from this run's model, controller, prompts and judge, and from `content`."""
        return TraceStore.key(run=self._identity, **content)

    @cached_property
    def weights_key(self) -> str:
        """Base, router and experts: what an edited answer depends on besides gate, mixture, scale and prompt."""
        weights = (self.folder / "controller" / "controller.safetensors").read_bytes()
        return TraceStore.key(
            base=self.backbone.fingerprint,
            dtype=str(self.backbone.dtype),
            weights=hashlib.sha256(weights).hexdigest(),
            config=self.controller.config.model_dump(mode="json"),
        )

    @cached_property
    def _identity(self) -> str:
        c = self.controller
        return TraceStore.key(
            schema=Diagnostics.model_fields["schema_version"].default,
            weights=self.weights_key,
            controller=[repr(c.policy), repr(c.mixture), c.scale, c.use_veto],
            prompts=[(p.id, *p.asked, p.bucket.value, p.group, p.target) for p in (*self.prompts, *self.train)],
            training=self.training.model_dump(mode="json"),
            targets_from=self.config.targets_from,
            decoding=self.config.decoding.model_dump(mode="json"),
            judge=self.judge.name,
        )


def open_study(folder: Path, means: Means, judge: Judge) -> Study:
    """raises RunError for a run that was not evaluated, or whose saved answers are not those of its prompts."""
    config = read_config(folder)
    metrics = read_metrics(folder)
    backbone = means.load(config.model, config.dtype)
    store = means.store()
    controller = load_controller(folder / "controller", backbone)
    splits = recorded_split(config, folder)
    held_out = splits.of(SplitName.HELD_OUT)
    base = {c.id: c for c in load_completions(folder / "completions" / "base.jsonl")}
    if missing := [p.id for p in held_out if p.id not in base]:
        raise RunError(
            f"{folder} has no base answer to {len(missing)} held-out prompts (first: {missing[0]}): its prompts or its "
            f"judge changed since. Evaluate again: paving eval {folder}"
        )
    return Study(
        folder=folder,
        config=config,
        metrics=metrics,
        backbone=backbone,
        store=store,
        controller=controller,
        prompts=held_out,
        train=splits.of(SplitName.TRAIN),
        base=base,
        judge=judge,
        means=means,
    )


def read_metrics(folder: Path) -> Metrics:
    path = folder / "metrics.json"
    if not path.exists():
        raise RunError(f"{folder} has no metrics.json yet. Evaluate it first: paving eval {folder}")
    try:
        return Metrics.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged or of another version. Evaluate again: paving eval {folder}") from error
