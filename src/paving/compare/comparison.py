"""`paving compare`, top to bottom: fit, sweep on the calibration split, choose by rules, measure on the held-out split."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from paving.backbone import BackboneError
from paving.compare.bench import Bench, open_bench, unavailable
from paving.compare.choose import choices
from paving.compare.fitting import Fitting
from paving.compare.held_out import held_out_rows, to_measure
from paving.compare.methods import METHODS, OWN_ROUTING, Method, check_variants, method
from paving.compare.own import own_points, own_record, own_rules
from paving.compare.sweep import OpenAnswers, figures, kept_decisions, sweep
from paving.evaluation.comparison import OWN, Comparison, Limits, MethodRecord, Objective, SweepFigures, read_comparison
from paving.evaluation.diagnostics.usefulness import INSTALL, check_bert_score, overlap_available
from paving.evaluation.judges import Judge
from paving.prompts.types import Bucket, count_by_bucket
from paving.run import Means, report
from paving.run_folder import RunError, write_text
from paving.steering.checks import SteeringError

FILE = Path("comparison") / "comparison.json"
OBJECTIVES: tuple[Objective, ...] = ("two", "three")


@dataclass(frozen=True)
class Asked:
    """What one comparison measures. variants: method's name -> its variants that were asked for."""

    methods: tuple[Method, ...]
    variants: Mapping[str, Sequence[str]]
    objectives: tuple[Objective, ...]

    def every_variant(self) -> list[str]:
        return list(dict.fromkeys(v for names in self.variants.values() for v in names))


def compare(
    folder: Path,
    means: Means,
    *,
    methods: Sequence[str] = (),
    variants: Sequence[str] = (),
    objectives: Sequence[Objective] = (),
    limits: Limits | None = None,
    bert_model: str | None = None,
    judge: Judge | None = None,
    table: Sequence[Method] | None = None,
) -> Comparison:
    """Comparators beside the run's own rows: RUN/comparison/comparison.json, and a section of RUN/report.html.

    methods, variants, objectives  by name; empty: all methods, all variants, three objectives. Those of an earlier
                                   comparison of this run stay. `residual-paving` is always there; by itself it asks
                                   for no comparator
    bert_model                     an encoder for BERTScore; None: not measured
    table                          the methods that there are, `METHODS` unless given

    raises ValueError for a name that is not known, RunError for a run that was not evaluated
    """
    table = METHODS if table is None else table
    asked = asked_for(folder, table, methods, variants, objectives)  # a wrong name is refused before a model is loaded
    if bert_model is not None:
        check_bert_score()
    limits = limits or Limits()
    bench = open_bench(folder, means, judge)
    if asked.methods and set(asked.every_variant()) <= set(unavailable(bench, asked.every_variant())):
        raise RunError(f"{folder} has no fitted veto, so there is no probe+veto. Leave --variant out, or name another.")
    fittings, swept, failed = all_sweeps(bench, asked.methods)
    points = [*own_points(bench, limits), *all_figures(bench, fittings, swept, asked, limits)]
    chosen = choices(points, asked.objectives)
    records = [method_record(m, swept.get(m.name, ()), failed.get(m.name)) for m in asked.methods]
    records += earlier_failures(folder, {r.name for r in records})
    records.append(own_record(points, bench.controller.scale))
    told = {r.name: r.note for r in records}
    rows = held_out_rows(bench, to_measure(bench, fittings, chosen), told, bert_model, own_rules(chosen))
    found = Comparison(
        run=folder.name,
        model=bench.config.model,
        seed=bench.config.training.seed,
        judge=bench.judge.name,
        decoding=bench.config.decoding.model_dump(),
        calibration={b.value: len(prompts) for b, prompts in bench.calibration.items()},
        held_out=count_by_bucket(bench.held_out),
        variants=asked.every_variant(),
        objectives=list(asked.objectives),
        limits=limits,
        methods=records,
        sweeps=points,
        choices=chosen,
        rows=rows,
        notes=[*(said_of((r.name, r.failed)) for r in records if r.failed), *notes_of(bench, asked, bert_model)],
    )
    write_text(folder / FILE, found.model_dump_json(indent=1))
    for fitting in fittings:
        fitting.forget()
    report(folder)
    return found


def asked_for(
    folder: Path,
    table: Sequence[Method],
    methods: Sequence[str],
    variants: Sequence[str],
    objectives: Sequence[Objective],
) -> Asked:
    """Names checked, and those of an earlier comparison added: asking for one more must not take away another.

    An earlier file that cannot be read adds none (comparing again is how it is mended), nor does a method that is gone.
    """
    named = list(dict.fromkeys(methods))
    asked = [] if named == [OWN] else [method(name, table) for name in named if name != OWN] or list(table)
    if asked:
        check_variants(variants, asked)
    elif variants:
        raise ValueError(f"{OWN} is swept at its own gate and under the oracle; leave --variant out.")
    if unknown := [o for o in objectives if o not in OBJECTIVES]:
        raise ValueError(f"the objective {unknown[0]!r} is not known; allowed: {', '.join(OBJECTIVES)}.")
    pairs = {m.name: [v for v in m.variants if not variants or v in variants] for m in asked}
    sought = list(objectives or ("three",))
    with suppress(ValueError):
        if (earlier := read_comparison(folder / FILE)) is not None:
            for choice in (c for c in earlier.choices if c.method != OWN):
                pairs.setdefault(choice.method, []).append(choice.variant)
            sought += earlier.objectives
    kept = tuple(m for m in table if pairs.get(m.name))  # a weight edit has no variant `probe` to be measured under
    return Asked(
        methods=kept,
        variants={m.name: [v for v in m.variants if v in pairs[m.name]] for m in kept},
        objectives=tuple(o for o in OBJECTIVES if o in sought),
    )


def all_sweeps(
    bench: Bench, methods: Sequence[Method]
) -> tuple[list[Fitting], dict[str, list[OpenAnswers]], dict[str, str]]:
    """(methods that could be fitted, their sweeps, why the others could not be: their rows are n/a)."""
    fittings, swept, failed = [], {}, {}
    for fitting in (Fitting(m, bench) for m in methods):
        try:
            swept[fitting.method.name] = sweep(bench, fitting)
        except (SteeringError, BackboneError, FloatingPointError) as error:
            failed[fitting.method.name] = str(error)
            bench.means.say(said_of((fitting.method.name, str(error))))
        else:
            fittings.append(fitting)
    return fittings, swept, failed


def earlier_failures(folder: Path, known: Collection[str]) -> list[MethodRecord]:
    """Methods that could not be fitted when they were asked for, and were not asked for again: n/a as before."""
    with suppress(ValueError):
        if (earlier := read_comparison(folder / FILE)) is not None:
            return [m for m in earlier.methods if m.failed and m.name not in known]
    return []


def said_of(failure: tuple[str, str]) -> str:
    return f"{failure[0]} could not be fitted, so it is n/a: {failure[1]}"


def all_figures(
    bench: Bench,
    fittings: Sequence[Fitting],
    swept: dict[str, list[OpenAnswers]],
    asked: Asked,
    limits: Limits,
) -> list[SweepFigures]:
    """Every method, variant and scale; a routing that methods share is asked once."""
    prompts = [p for b in Bucket for p in bench.calibration[b]]
    missing = unavailable(bench, asked.every_variant())
    shared: dict[str, dict[str, bool]] = {}
    points = []
    for fitting in fittings:
        name = fitting.method.name
        for variant in (v for v in asked.variants[name] if v not in missing):
            place = f"{name}'s-own" if variant == OWN_ROUTING else variant
            if place not in shared:
                follows_from = fitting.key if variant == OWN_ROUTING else bench.routing_key(variant)
                shared[place] = kept_decisions(bench, place, follows_from, prompts, partial(fitting.routing, variant))
            for answers in swept[name]:
                points.append(figures(answers, variant, shared[place], bench.base_labels, bench.calibration, limits))
    return points


def method_record(m: Method, swept: Sequence[OpenAnswers], failed: str | None) -> MethodRecord:
    tried, fitted = [a.scale for a in swept], [a.note for a in swept[:1]]
    left_out = [s for s in sorted(set(m.scales)) if s not in tried]
    note = "; ".join(filter(None, (m.note, *fitted)))
    left_out = [] if failed else left_out
    return MethodRecord(name=m.name, note=note, scales=tried, left_out=left_out, failed=failed)


def notes_of(bench: Bench, asked: Asked, bert_model: str | None) -> list[str]:
    """What was not measured, and what the figures rest on."""
    notes = [
        f"Not worse is decided by the judge {bench.judge.name}, not by reading both answers side by side: an answer is "
        "worse where it is refused, broken or judged HARMFUL and the base's answer to the same prompt is none of these."
    ]
    if bench.config.router is not None and bench.config.calibration.promise is None:
        notes.append(
            "This run's gate was searched with the calibration prompts, too, on which scales are chosen: there its figures "
            "are too good, and the scale taken for it may be too large; comparators' probes learned from training prompts."
        )
    if "probe" in asked.every_variant() and (auc := bench.probe_auc()) is not None:
        own = bench.metrics.router.auc_edit_vs_harmful
        notes.append(
            f"AUC of held-out edit prompts against harmful keeps: the comparators' probe {auc:.3f}, the run's own gate "
            f"{'n/a' if own is None else format(own, '.3f')}."
            + (" Both read the same states." if bench.config.router is None else "")
        )
    missing = unavailable(bench, asked.every_variant())
    notes += [f"{v} was not measured: the run has no fitted veto, so that variant is n/a." for v in missing]
    if not overlap_available():
        notes.append(f"ROUGE-L and chrF were not measured: {INSTALL}")
    if bert_model is None:
        notes.append("BERTScore was not measured: name a model for it with --bert-score MODEL.")
    return notes
