"""An evaluated run, opened to measure comparators on: its prompts, targets, base answers, probe and veto."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

from paving.backbone import Backbone
from paving.compare.workshop import Workshop
from paving.controller.residual_paving import ResidualPaving
from paving.controller.store import load_controller
from paving.diagnose.study import read_metrics
from paving.evaluation.judges import Judge
from paving.evaluation.results import Metrics
from paving.evaluation.statistics import auc
from paving.evaluation.three_way import HORIZON
from paving.generation import Completion
from paving.prompts.types import Bucket, Prompt, SplitName, Splits
from paving.run import Means
from paving.run_folder import RunConfig, RunError, read_config, write_text
from paving.run_labels import labels_of
from paving.run_splits import recorded_split
from paving.steering.material import Material
from paving.steering.routing import Global, Labelled, Linear, Probe, fit_probe
from paving.steering.steered import Routing
from paving.traces.completions import as_completions, base_continuations
from paving.traces.store import TraceStore
from paving.traces.targets import EditTarget
from paving.traces.top_k import TopK
from paving.training.calibrate import choose_threshold
from paving.training.prepare import boundary_matrix, edit_targets, usable_targets
from paving.training.promise import promises, strictest
from paving.training.verdicts import LabelsOf

T = TypeVar("T")
ROUTING_VERSION = 2  # raised when the probe or its threshold is made in another way
USABLE_VERSION = 1  # raised when another target is called unusable by the same judge
FITTING = (SplitName.TRAIN, SplitName.CALIBRATION)


@dataclass(frozen=True)
class Bench:
    """What is costly is made when first asked for, and not at all where everything that it would serve is on disk."""

    folder: Path
    config: RunConfig
    metrics: Metrics
    backbone: Backbone
    store: TraceStore
    controller: ResidualPaving
    splits: Splits
    judge: Judge
    means: Means

    @property
    def out(self) -> Path:
        return self.folder / "comparison"

    @property
    def fits(self) -> Path:
        """Editors that would take minutes to fit again, while a comparison is under way."""
        return self.out / "fits"

    @cached_property
    def calibration(self) -> dict[Bucket, tuple[Prompt, ...]]:
        """As many calibration prompts as the run's own calibration looked at."""
        found = {b: self.splits.of(SplitName.CALIBRATION, b) for b in Bucket}
        return found | {Bucket.EDIT: found[Bucket.EDIT][: self.config.calibration.max_edit_prompts]}

    @cached_property
    def held_out(self) -> tuple[Prompt, ...]:
        return self.splits.of(SplitName.HELD_OUT)

    @cached_property
    def material(self) -> Material:
        """The run's own targets, as long as its training had them, and the base's whole answers."""
        targets = self._fitting_targets
        prompts = [p for s in FITTING for p in self.splits.of(s)]
        answers = self.base_answers(prompts)
        return Material(
            Splits(self.splits.train, self.splits.calibration, ()),  # a method that asks for held-out prompts finds none
            {i: t.continuation for i, t in targets.items()},
            answers,
            self.config.training.seed,
            frozenset(self._unusable),
        )

    @cached_property
    def _unusable(self) -> list[str]:
        """Calibration edit prompts whose target chooses nothing: the judge's one part in what is fitted. (Training dropped
        what could not be used of its own.)"""
        choosing = self.splits.of(SplitName.CALIBRATION, Bucket.EDIT)

        def find() -> list[str]:
            usable = usable_targets(self.backbone, choosing, self._fitting_targets, self._labels)
            return sorted(p.id for p in choosing if p.id not in usable)

        key = self.key(unusable_to=self.judge.name, choosing=[p.id for p in choosing], version=USABLE_VERSION)
        return self.kept("unusable-targets", key, find)

    @cached_property
    def _reference(self) -> Backbone | None:
        """The model whose answers are targets, if any."""
        asked = self.config.targets_from
        return None if asked is None else self.means.load(asked, self.config.dtype)

    @cached_property
    def _fitting_targets(self) -> dict[str, EditTarget]:
        return self._targets([p for s in FITTING for p in self.splits.of(s, Bucket.EDIT)])

    def _targets(self, prompts: Sequence[Prompt]) -> dict[str, EditTarget]:
        training = self.config.training
        if self.config.targets_from is not None:
            training = training.model_copy(update={"targets": "reference"})
        return edit_targets(self.backbone, self.store, prompts, training, self._reference, self.means.stage)

    @cached_property
    def held_out_targets(self) -> dict[str, list[int]]:
        """Tokens of the targets that held-out edit prompts would have: for what answers are read beside, and nothing else.
        Empty for prompts that have none of their own (targets `own`)."""
        edit = [p for p in self.held_out if p.bucket is Bucket.EDIT]
        if self.config.training.targets == "own":
            edit = [p for p in edit if p.target]
        key = self.key(targets_of=[p.id for p in edit])
        return self.kept(
            "held-out-targets",
            key,
            lambda: {i: list(t.continuation) for i, t in self._targets(edit).items()} if edit else {},
        )

    def kept(self, name: str, key: str, make: Callable[[], T]) -> T:
        """What `make` finds, or found before under this key: comparison/decisions/NAME.json."""
        path = self.out / "decisions" / f"{name}.json"
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # absent; damaged, or of another version
            there = json.loads(path.read_text(encoding="utf-8"))
            if there["key"] == key:
                return there["found"]
        found = make()
        write_text(path, json.dumps({"key": key, "found": found}))
        return found

    @cached_property
    def workshop(self) -> Workshop:
        return Workshop(self.backbone, self.material, self.means.stage, self.means.say)

    def base_answers(self, prompts: Sequence[Prompt]) -> dict[str, tuple[int, ...]]:
        tick = self.means.stage("base answers (training and calibration)", len(prompts))
        return base_continuations(self.backbone, self.store, prompts, self.config.decoding.max_new_tokens, tick=tick)

    @cached_property
    def _labels(self) -> LabelsOf:
        return labels_of(self.judge, self.folder / "comparison" / "labels.jsonl")

    def labels(self, answers: Sequence[Completion]) -> dict[str, str]:
        """Prompt id -> label by the run's judge."""
        return {c.id: label for c, label in zip(answers, self._labels(answers), strict=True)}

    @cached_property
    def base_labels(self) -> dict[str, str]:
        """Labels of the base's own answers to the calibration's edit prompts and harmful keeps."""
        prompts = [*self.calibration[Bucket.EDIT], *self.calibration[Bucket.HARMFUL_KEEP]]
        return self.labels(as_completions(self.backbone, prompts, self.base_answers(prompts)))

    @cached_property
    def keep_continuations(self) -> dict[str, tuple[int, ...]]:
        """The base's continuations that preservation looks at, of the calibration's keeps."""
        keeps = [*self.calibration[Bucket.BENIGN_KEEP], *self.calibration[Bucket.HARMFUL_KEEP]]
        return base_continuations(self.backbone, self.store, keeps, HORIZON)

    @cached_property
    def base_distributions(self) -> dict[tuple[str, ...], TopK]:
        """Filled by `keep_divergence` at the first scale, and read at all others."""
        return {}

    def routing(self, variant: str) -> Routing:
        """The same for every method. Without a fitted veto there is no probe+veto: see `unavailable`."""
        match variant:
            case "probe":
                return self.probe
            case "probe+veto":
                return replace(self.probe, veto=self.veto)
        return next(r for r in (Global(), Labelled()) if r.name == variant)

    @cached_property
    def probe(self) -> Probe:
        """Linear, on what the run's router reads; its threshold is chosen by the rule that chose the run's own, and raised
        for the promise that the run makes, if any. (A searched gate has thresholds of its own; the probe then has not.)"""
        read = self.controller.config
        z = boundary_matrix(self.backbone, self.splits.train, read)
        linear = fit_probe(z, [p.bucket is Bucket.EDIT for p in self.splits.train])
        prompts = self.splits.of(SplitName.CALIBRATION)
        logits = linear.margin(boundary_matrix(self.backbone, prompts, read))
        cost = self.config.calibration.harmful_cost
        threshold = choose_threshold(logits, [p.bucket for p in prompts], harmful_cost=cost)
        if self.config.calibration.promise is not None:
            made = promises(logits.tolist(), prompts, self.config.calibration.promise)
            threshold = max(threshold, strictest(made))
        return Probe(read.route_layers, read.pooling, replace(linear, threshold=threshold))

    def probe_auc(self) -> float | None:
        """Of held-out edit prompts against harmful keeps; None where a bucket is empty."""
        prompts = [p for p in self.held_out if p.bucket is not Bucket.BENIGN_KEEP]

        def find() -> float | None:
            margins = self.probe.edit.margin(boundary_matrix(self.backbone, prompts, self.controller.config)).tolist()
            by_bucket = {b: [m for m, p in zip(margins, prompts, strict=True) if p.bucket is b] for b in Bucket}
            return auc(by_bucket[Bucket.EDIT], by_bucket[Bucket.HARMFUL_KEEP])

        return self.kept("probe-auc", self.key(routing=self.routing_key("probe"), asked=[p.id for p in prompts]), find)

    @property
    def veto(self) -> Linear | None:
        """The run's own, as it was fitted; None where it has none."""
        router, veto = self.controller.weights.router, self.controller.weights.veto
        if not bool(veto.fitted):
            return None
        mean, std, weight = (t.detach().cpu().to(torch.float32) for t in (router.mean, router.std, veto.weight))
        return Linear(mean, std, weight, float(veto.bias), float(veto.threshold))

    def routing_key(self, variant: str) -> str:
        """Names a routing by what it follows from, besides the prompts: the router's inputs, and the run's own veto."""
        if variant not in ("probe", "probe+veto"):
            return variant
        reads = self.config.controller if self.config.router is None else self.controller.config  # a search reads more
        read, cost = reads.model_dump(mode="json"), self.config.calibration.harmful_cost
        weights = (self.folder / "controller" / "controller.safetensors").read_bytes() if self.veto is not None else b""
        veto = hashlib.sha256(weights).hexdigest() if variant == "probe+veto" else None
        content = {"variant": variant, "read": read, "harmful_cost": cost, "veto": veto, "version": ROUTING_VERSION}
        if self.config.calibration.promise is not None:
            content["promise"] = self.config.calibration.promise.model_dump(mode="json")
        return TraceStore.key(**content)

    def key(self, **content: object) -> str:
        """A name for what was made from this base, these prompts and targets, and `content`; no judge has a part in it."""
        return TraceStore.key(run=self._identity, **content)

    def fit_key(self, **content: object) -> str:
        """A name for what is fitted: the judge says which targets choose."""
        return self.key(unusable=self._unusable, **content)

    @cached_property
    def _identity(self) -> str:
        prompts = [(p.id, *p.asked, p.bucket.value, p.target, p.source, p.group) for s in FITTING for p in self.splits.of(s)]
        training = self.config.training
        return TraceStore.key(
            base=self.backbone.fingerprint,
            dtype=str(self.backbone.dtype),
            device=self.backbone.device.type,  # answers are the same bit for bit on one kind alone
            prompts=prompts,
            targets=[training.targets, training.horizon, training.seed, self.config.targets_from],
            decoding=self.config.decoding.model_dump(mode="json"),
        )


def open_bench(folder: Path, means: Means, judge: Judge | None = None) -> Bench:
    """raises RunError for a run that was not trained or not evaluated."""
    config = read_config(folder)
    metrics = read_metrics(folder)
    judge = judge or means.judge(config.judge)
    if metrics.judge != judge.name:
        raise RunError(
            f"{folder} was evaluated by the judge {metrics.judge}; by {judge.name} its own rows would stand beside others' "
            f"on other grounds. Evaluate it again first: paving eval {folder}"
        )
    if config.decoding.do_sample:
        raise RunError(
            f"{folder} decodes by sampling; comparators are swept on greedy answers. Use a run that decodes greedily."
        )
    splits = recorded_split(config, folder)
    backbone = means.load(config.model, config.dtype)
    controller = load_controller(folder / "controller", backbone)
    return Bench(folder, config, metrics, backbone, means.store(), controller, splits, judge, means)


def unavailable(bench: Bench, variants: Sequence[str]) -> list[str]:
    """Variants that were asked for and that this run cannot have."""
    return [v for v in variants if v == "probe+veto" and bench.veto is None]
