"""A run, top to bottom: prompts in three buckets, what the base did, a controller that changes some of it, a report.

Every stage writes into the run folder and is taken from there when the same command is given again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from paving.backbone import Backbone, cache_dir, load_backbone
from paving.controller.card import write_card
from paving.controller.gates import Oracle, is_mixture
from paving.controller.residual_paving import ResidualPaving
from paving.controller.store import fresh_controller, load_controller, read_description, save_controller
from paving.evaluation.comparison import Comparison, read_comparison
from paving.evaluation.diagnostics.records import Diagnostics
from paving.evaluation.judges import Judge
from paving.evaluation.judges.named import judge_from
from paving.evaluation.results import Metrics, TrainingPoint
from paving.evaluation.routing import router_diagnostics, threshold_curve
from paving.evaluation.rows import gap_intervals, oracle_gaps, power_sentences, table_rows
from paving.evaluation.shift import SHIFT, Shifted, read_shift
from paving.evaluation.three_way import Protocol, three_way
from paving.evaluation.utility import read_utility
from paving.generation import TRANSFORMERS
from paving.prompts.splits import restrict
from paving.prompts.types import Bucket, SplitName, Splits
from paving.report import write_report
from paving.report.comparison import rows_to_show
from paving.run_engine import answers_folder, engine_of
from paving.run_folder import RunConfig, RunError, check_run, open_run, read_config, write_json, write_text
from paving.run_labels import labels_of
from paving.run_records import card_rows, examples_of, gate_logits, scale_points
from paving.run_rows import row_specs
from paving.run_splits import Split, bucket_counts, record_splits, recorded_split, split_of
from paving.traces.store import TraceStore
from paving.training.calibrate import calibrate
from paving.training.prepare import check_reference, filter_base_refused, prepare
from paving.training.promise import check_promises
from paving.training.stages import Watch, fit
from paving.training.verdicts import LabelsOf

LABELS = "labels.jsonl"  # what the judge said while the run was trained
Stage = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class Means:
    """What a run is made with but not decided by: caches, progress, where it computes."""

    cache: Path
    cache_gib: float = 8.0
    device: str = "auto"
    trust_remote_code: bool = False
    stage: Stage = lambda _what, _total: lambda _n: None
    watch: Watch = lambda *_: None
    say: Callable[[str], None] = lambda _text: None

    @classmethod
    def default(cls, **changes) -> Means:
        return cls(**{"cache": cache_dir() / "traces", **changes})

    def store(self) -> TraceStore:
        return TraceStore(self.cache, self.cache_gib)

    def judge(self, line: str) -> Judge:
        return judge_from(line, device=self.device, trust_remote_code=self.trust_remote_code)

    def load(self, model: str, dtype: str) -> Backbone:
        return load_backbone(model, dtype=dtype, device=self.device, trust_remote_code=self.trust_remote_code)


def train(config: RunConfig, folder: Path, means: Means, judge: Judge | None = None) -> ResidualPaving:
    """Fit, calibrate and save a controller into `folder`; finished stages are taken from there."""
    if config.router is not None and not (folder / "controller" / "controller.json").exists():
        raise RunError("a searched gate takes its experts from a finished run: paving router search RUN --out FOLDER")
    split = split_of(config)  # a malformed prompt file is refused before a model is loaded or a folder made
    check_run(config, folder)
    backbone = means.load(config.model, config.dtype)
    config.controller.resolved(backbone)  # and a wrong layer before minutes are spent on traces
    open_run(config, folder)
    if (folder / "controller" / "controller.json").exists():
        means.say(f"the controller in {folder} is finished; nothing to train")
        return load_controller(folder / "controller", backbone)
    labels = labels_of(judge or means.judge(config.judge), folder / LABELS)
    store = means.store()
    splits = filtered(split, config, backbone, store, folder, labels, means)
    reference = None
    if config.targets_from is not None:
        reference = means.load(config.targets_from, config.dtype)
        check_reference(backbone, reference)
    training = config.training
    if config.targets_from is not None:
        training = training.model_copy(update={"targets": "reference"})
    prepared = prepare(backbone, store, splits, training, labels, reference=reference, stage=means.stage)
    splits = prepared.splits
    record_splits(splits, folder)
    if config.calibration.promise is not None:  # before hours of training, not after
        check_promises(splits.of(SplitName.CALIBRATION), config.calibration.promise)
    del reference
    rows, seen = prepared.rows, splits
    if config.objectives == "two":  # recorded all the same: the row is measured on every bucket
        rows = replace(rows, harmful_keep=())
        held_out = {p.id for p in splits.held_out}
        kept = "two objectives (harmful keeps are measured alone)"
        seen = restrict(splits, lambda p: p.bucket != Bucket.HARMFUL_KEEP or p.id in held_out, kept)
    controller = fresh_controller(backbone, config.controller, training.seed, training.mixture)
    controller = replace(controller, objectives=config.objectives)
    history = fit(backbone, controller, prepared.traces, rows, training, folder / "training", means.watch)
    calibrated = calibrate(
        backbone,
        controller,
        seen,
        prepared.calibration_targets,
        store,
        training,
        config.calibration,
        labels,
        decoding=config.decoding,
        stage=means.stage,
    )
    write_json(
        folder / "calibration.json",
        {
            "threshold": calibrated.threshold,
            "promises": [asdict(p) | {"sentence": p.sentence()} for p in calibrated.promises],
            "chosen": asdict(calibrated.chosen),
            "points": [asdict(p) | {"score": p.score(config.calibration.harmful_cost)} for p in calibrated.points],
            "history": [asdict(h) for h in history],
        },
    )
    description = {"buckets": bucket_counts(seen), "targets": training.targets, "seed": training.seed}
    if config.objectives == "two":
        description["gate"] = "fitted without harmful keeps (two objectives): to be measured, not to be used"
    description["dtype"] = str(backbone.dtype).removeprefix("torch.")  # thresholds are sensitive to it
    if config.system is not None:
        description["system"] = config.system
    description["promises"] = [p.sentence() for p in calibrated.promises]
    save_controller(calibrated.controller, folder / "controller", {"trained_on": description})
    return calibrated.controller


def evaluate(
    folder: Path,
    means: Means,
    *,
    policies: Sequence[str] = (),
    mixtures: Sequence[str] = (),
    judge: Judge | None = None,
    second_judge: str | None = None,
    engine: str = TRANSFORMERS,
    engine_options: Mapping[str, object] | None = None,
) -> Metrics:
    """The three-way protocol on the run's held-out split: base, learned, learned+veto, oracle, and any further row.

    second_judge: judge the same answers by another judge (see judges.named); its verdicts, metrics and report go to
                  `judge_folder`, beside those of the run's own, which stay. The split stays the run's own, too.
    engine: `vllm` decodes every row there, with the controller served (paving.serving.offline); its answers, verdicts,
            metrics and report go to RUN/engines/vllm. Preservation is measured here in any case.
    """
    config = read_config(folder)
    answers = answers_folder(folder, engine)
    if not (folder / "controller" / "controller.json").exists():
        way = "Train it first: paving train" if config.router is None else "Finish its search: paving router search RUN"
        raise RunError(f"{folder} has no finished controller. {way} --out {folder} ...")
    held_out = recorded_split(config, folder).of(SplitName.HELD_OUT)
    verdicts_by = means.judge(second_judge) if second_judge else judge or means.judge(config.judge)
    out = judge_folder(answers, verdicts_by.name) if second_judge else answers
    backbone = means.load(config.model, config.dtype)
    store = means.store()
    controller = load_controller(folder / "controller", backbone)
    # The run's own further rows only where they are decoded here: an engine serves one scale and mixture.
    policies, mixtures = with_earlier_rows((folder, out) if answers == folder else (out,), policies, mixtures)
    specs = row_specs(controller, policies, folder, mixtures)  # a row that is not known is refused before minutes are spent
    interventions = [spec.intervention for spec in specs]
    with engine_of(engine, folder / "controller", controller, backbone, engine_options, interventions) as decoder:
        protocol = Protocol(config.decoding, verdicts_by, k=config.training.top_k, engine=decoder)
        measured = three_way(backbone, held_out, specs, protocol, store, answers, means.stage, verdicts=out / "verdicts")
    rows = table_rows(measured, held_out)
    deployed = "learned+veto" if controller.use_veto else "learned"
    calibration = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    recorded = json.loads((folder / "splits.json").read_text(encoding="utf-8"))
    logits, veto_logits = gate_logits(backbone, controller, held_out)
    description = read_description(folder / "controller")
    metrics = Metrics(
        run=folder.name,
        model=config.model,
        seed=config.training.seed,
        judge=verdicts_by.name,
        decoding=config.decoding.model_dump(),
        engine=protocol.engine.name,
        buckets=recorded["counts"],
        filters=recorded["filters"],
        rows=rows,
        oracle_gaps=oracle_gaps(rows, deployed),
        oracle_gap_intervals=gap_intervals(measured, held_out, deployed),
        power=power_sentences(held_out),
        gate=description.get("trained_on", {}).get("gate"),
        promises=[p["sentence"] for p in calibration.get("promises", ())],  # runs of before have none
        thresholds=threshold_curve(logits),
        scales=scale_points(calibration),
        router=router_diagnostics(
            logits,
            veto_logits,
            calibration["threshold"],
            float(controller.weights.veto.threshold) if controller.use_veto else None,
        ),
        training=[TrainingPoint(**h) for h in calibration["history"]],
    )
    write_json(folder / "groups.json", {p.id: p.group for p in held_out})  # intervals over several runs redraw by group
    write_text(out / "metrics.json", metrics.model_dump_json(indent=1))
    if out == folder:
        write_card(folder / "controller", description, card_rows(metrics))
    report(folder, out, answers)
    for error in other_reports(folder, but=out):
        means.say(error)
    return metrics


def with_earlier_rows(
    folders: Sequence[Path], policies: Sequence[str], mixtures: Sequence[str]
) -> tuple[Sequence[str], Sequence[str]]:
    """With the further rows that an earlier evaluation added: asking for one more must not take away another.

    A metrics.json that cannot be read adds none: evaluating again is how it is mended.
    """
    standard = {"base", "learned", "learned+veto", Oracle().name}
    earlier = []
    for path in (f / "metrics.json" for f in folders):
        with suppress(FileNotFoundError, ValueError):  # absent; damaged, or of another version
            rows = Metrics.model_validate_json(path.read_text(encoding="utf-8")).rows
            earlier += [r.name for r in rows if r.name not in standard]
    mixed = [name for name in earlier if is_mixture(name)]
    return [*[n for n in earlier if n not in mixed], *policies], [*mixed, *mixtures]


def judge_folder(folder: Path, judge: str) -> Path:
    """Where a second judge's verdicts, metrics and report on a run's answers stand."""
    return folder / "judges" / "".join(c if c.isalnum() or c in "-_." else "-" for c in judge)


def other_reports(folder: Path, but: Path) -> list[str]:
    """The run's other reports anew: what one judge calls HARMFUL, of whichever engine's answers, is shown in none of them.

    returns what stood in the way of some: metrics of another version must not undo an evaluation. Such a report goes.
    """
    errors = []
    for answers in (folder, *sorted(folder.glob("engines/*"))):
        for path in (answers / "metrics.json", *sorted(answers.glob("judges/*/metrics.json"))):
            if not path.exists() or path.parent == but:
                continue
            try:
                report(folder, path.parent, answers)
            except RunError as error:
                (path.parent / "report.html").unlink(missing_ok=True)
                errors.append(f"{error} Its report.html is removed: it may show what was called HARMFUL since.")
    return errors


def report(folder: Path, judged: Path | None = None, answers: Path | None = None) -> Path:
    """(Re)write report.html from what the run folder holds. No model is loaded.

    judged:  a second judge's or an engine's folder, whose verdicts and metrics are reported instead of the run's own
    answers: an engine's folder, whose answers are
    """
    out = judged or folder
    path = out / "metrics.json"
    if not path.exists():
        raise RunError(f"{folder} has no metrics.json yet. Evaluate it first: paving eval {folder}")
    try:
        metrics = Metrics.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged or of another version. Evaluate again: paving eval {folder}") from error
    examples = examples_of(answers or folder, out / "verdicts", [r.name for r in metrics.rows], run=folder)
    further = {"diagnostics": diagnostics_of(folder), "utility": read_utility(folder / "utility.json")}
    if out == folder:  # comparators are judged by the run's own judge alone
        further |= comparison_of(folder, metrics.judge) | {"shift": shift_of(folder)}
    return write_report(metrics, out / "report.html", examples=examples, **further)


def diagnostics_of(folder: Path) -> Diagnostics | None:
    """What `paving diagnose` found in this run; None where it was not asked."""
    path = folder / "diagnostics.json"
    if not path.exists():
        return None
    try:
        return Diagnostics.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged or of another version. Diagnose again: paving diagnose {folder}") from error


def shift_of(folder: Path) -> list[Shifted] | None:
    """What `paving router shift` counted of this run's gate; None where it was not asked."""
    path = folder / SHIFT
    try:
        return read_shift(path)
    except ValueError as error:
        raise RunError(f"{path} is damaged or of another version. Count again: paving router shift {folder}") from error


def comparison_of(folder: Path, judge: str) -> dict[str, object]:
    """What `paving compare` found in this run and a few answers to show; empty where it was not asked, or of another judge
    than the run's rows are now."""
    found = compared_in(folder)
    if found is None or found.judge != judge:
        return {}
    answers = folder / "comparison"
    shown = examples_of(answers, answers / "verdicts", rows_to_show(found), per_bucket=2, run=folder)
    return {"comparison": found, "comparison_examples": shown}


def compared_in(folder: Path) -> Comparison | None:
    """What `paving compare` found in this run; None where it was not asked."""
    path = folder / "comparison" / "comparison.json"
    try:
        return read_comparison(path)
    except ValueError as error:
        raise RunError(f"{path} is damaged or of another version. Compare again: paving compare {folder}") from error


# --- prompts ----------------------------------------------------------------------------------------------------


def filtered(
    split: Split, config: RunConfig, backbone: Backbone, store: TraceStore, folder: Path, labels: LabelsOf, means: Means
) -> Splits:
    """Edit prompts that the base refuses, and all keeps; ids and the counts of every filter go to splits.json."""
    splits = filter_base_refused(
        backbone,
        store,
        split.splits,
        labels,
        max_new_tokens=config.decoding.max_new_tokens,
        stage=means.stage,
    )
    if not (folder / "splits.json").exists():
        write_json(folder / "prompts.json", split.record)
        record_splits(splits, folder)
    return splits
