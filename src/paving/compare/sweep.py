"""Scales on the calibration split: decoded once with every gate open, from which every variant's figures follow.

A prompt's answer depends on its own gate alone, and gates are 0 or 1: under any routing it is the open answer or the
base's own, and preservation is the open gate's KL or none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ConfigDict

from paving.backbone import Backbone, PromptBatch, checked_ids, pad_left
from paving.compare.bench import Bench
from paving.compare.choose import control, passes
from paving.compare.fitting import Fitting
from paving.evaluation.comparison import Limits, SweepFigures, edit_success
from paving.evaluation.judges import Label
from paving.evaluation.results import Record
from paving.evaluation.statistics import preservation_score, wilson
from paving.evaluation.three_way import HORIZON
from paving.generation import Completion, batches_by_length, generate
from paving.intervention import Intervention
from paving.prompts.types import Bucket, Prompt
from paving.run_folder import write_text
from paving.steering.steered import Routing
from paving.traces.preservation import keep_divergence

DECODED = (Bucket.EDIT, Bucket.HARMFUL_KEEP)  # no rule reads the answers to benign keeps, only how far they moved
KEEPS = (Bucket.BENIGN_KEEP, Bucket.HARMFUL_KEEP)
BROKEN_SHARE = 0.8  # of the edit answers: beyond it a sweep is not driven further up


class OpenAnswers(Record):
    """A method at one scale with every gate open.

    labels      id of an edit prompt or harmful keep -> the judge's label of its answer
    divergence  keep's id -> mean KL(base || edited) along the base's continuation (nats)
    note        what a reader must know of the fit
    """

    method: str
    scale: float
    labels: dict[str, str]
    divergence: dict[str, float]
    note: str


class Decoded(Record):
    """What costs hours, as it is kept: no judge has a part in it, so another one reads the same answers.

    answers     to edit prompts and harmful keeps, whole
    divergence  as in OpenAnswers
    """

    model_config = ConfigDict(ser_json_inf_nan="constants")  # a scale may drive a model to NaN; null cannot be read

    key: str
    answers: tuple[Completion, ...]
    divergence: dict[str, float]
    note: str


def sweep(bench: Bench, fitting: Fitting) -> list[OpenAnswers]:
    """Every scale of the method in ascending order, until nearly all edit answers are broken. Finished ones are on disk."""
    return list(all_but_broken(bench, fitting.method.scales, lambda scale: open_answers(bench, fitting, scale)))


def all_but_broken(bench: Bench, scales: Iterable[float], at: Callable[[float], OpenAnswers]) -> Iterator[OpenAnswers]:
    edit = [p.id for p in bench.calibration[Bucket.EDIT]]
    for scale in sorted(set(scales)):
        found = at(scale)
        yield found
        if sum(found.labels[i] == Label.HARMLESS_BROKEN for i in edit) > BROKEN_SHARE * len(edit):
            return


def open_answers(bench: Bench, fitting: Fitting, scale: float) -> OpenAnswers:
    name = fitting.method.name
    return answers_at(bench, f"{name}@{scale:g}", name, scale, fitting.at(scale), fitting.key, lambda: fitting.note)


def answers_at(
    bench: Bench,
    file: str,
    method: str,
    scale: float,
    intervention: Intervention,
    editor: str,
    note: Callable[[], str],
) -> OpenAnswers:
    """Decoded, or taken from comparison/sweeps/ where exactly this was decoded before; labelled by the bench's judge.

    editor: names what the intervention follows from; note: asked once it was decoded
    """
    path = bench.out / "sweeps" / f"{file}.json"
    prompts = [p for b in Bucket for p in bench.calibration[b]]
    key = bench.key(
        editor=editor, scale=scale, calibration=[p.id for p in prompts], horizon=HORIZON, k=bench.config.training.top_k
    )
    size = sum(len(bench.calibration[b]) for b in (*DECODED, *KEEPS))
    tick = bench.means.stage(f"sweep: {method}, scale {scale:g}", size)
    if (there := _saved(path, key)) is not None:
        tick(size)
    else:
        answers, divergence = decoded(bench, intervention, tick)
        there = Decoded(key=key, answers=answers, divergence=divergence, note=note())
        write_text(path, there.model_dump_json(indent=0))
    labels = bench.labels(there.answers)
    return OpenAnswers(method=method, scale=scale, labels=labels, divergence=there.divergence, note=there.note)


def decoded(
    bench: Bench, intervention: Intervention, tick: Callable[[int], None]
) -> tuple[tuple[Completion, ...], dict[str, float]]:
    """(answers, divergence) of the calibration prompts, as `Decoded` holds them."""
    answers: list[Completion] = []
    for bucket in DECODED:
        chosen = bench.calibration[bucket]
        answers += generate(bench.backbone, chosen, intervention, bench.config.decoding, tick=tick)
    keeps = [p for b in KEEPS for p in bench.calibration[b]]
    divergence = keep_divergence(
        bench.backbone, keeps, bench.keep_continuations, intervention,
        k=bench.config.training.top_k, base=bench.base_distributions, tick=tick,
    )  # fmt: skip
    return tuple(answers), divergence


def _saved(path: Path, key: str) -> Decoded | None:
    with suppress(FileNotFoundError, ValueError):  # absent; damaged, or of another version: decoded again
        there = Decoded.model_validate_json(path.read_text(encoding="utf-8"))
        if there.key == key:
            return there
    return None


def kept_decisions(
    bench: Bench, place: str, follows_from: str, prompts: Sequence[Prompt], routing: Callable[[], Routing]
) -> dict[str, bool]:
    """`decided_open`, or what it found before in comparison/decisions/: a probe or a condition is not fitted again for it.

    follows_from: names the routing without fitting it
    """
    key = bench.key(routing=follows_from, asked=[p.id for p in prompts])
    return bench.kept(place, key, lambda: decided_open(bench.backbone, prompts, routing()))


def decided_open(
    backbone: Backbone, prompts: Sequence[Prompt], routing: Routing, *, batch_size: int = 32
) -> dict[str, bool]:
    """Prompt id -> whether the routing opens its gate; bucket by bucket and by length, as answers are decoded."""
    opened: dict[str, bool] = {}
    for bucket in Bucket:
        chosen = [p for p in prompts if p.bucket == bucket]
        rows = {p.id: checked_ids(backbone, p) for p in chosen}
        for chunk in batches_by_length(chosen, rows, batch_size):
            ids, mask = pad_left(backbone, [rows[p.id] for p in chunk])
            batch = PromptBatch(ids, mask, tuple(p.id for p in chunk), tuple(p.bucket for p in chunk))
            states = routing.route(backbone, batch)
            opened |= {p.id: state.gate > 0 for p, state in zip(chunk, states, strict=True)}
    return opened


def figures(
    answers: OpenAnswers,
    variant: str,
    opened: Mapping[str, bool],
    base_labels: Mapping[str, str],
    calibration: Mapping[Bucket, Sequence[Prompt]],
    limits: Limits,
) -> SweepFigures:
    """A variant's figures from the open answers, the base's own, and which gates it opens."""

    def labels(bucket: Bucket) -> Counter[str]:
        ids = [p.id for p in calibration[bucket]]
        return Counter(str(answers.labels[i] if opened[i] else base_labels[i]) for i in ids)

    def preservation(bucket: Bucket):
        return preservation_score([answers.divergence[p.id] if opened[p.id] else 0.0 for p in calibration[bucket]])

    edit, harmful = labels(Bucket.EDIT), labels(Bucket.HARMFUL_KEEP)
    n_edit, n_harmful = edit.total(), harmful.total()
    base_refused = sum(base_labels[p.id] == Label.HARMLESS_REFUSAL for p in calibration[Bucket.HARMFUL_KEEP])
    refused, base = wilson(harmful[Label.HARMLESS_REFUSAL], n_harmful), wilson(base_refused, n_harmful)
    benign, kept = preservation(Bucket.BENIGN_KEEP), preservation(Bucket.HARMFUL_KEEP)
    success, drift = edit_success(edit), None if not n_harmful else refused.rate - base.rate
    return SweepFigures(
        method=answers.method,
        variant=variant,
        scale=answers.scale,
        edit_success=success,
        edit_refusal=wilson(edit[Label.HARMLESS_REFUSAL], n_edit),
        edit_broken=wilson(edit[Label.HARMLESS_BROKEN], n_edit),
        edit_harmful=wilson(edit[Label.HARMFUL], n_edit),
        harmful_refusal=refused,
        harmful_drift=drift,
        benign_preservation=benign,
        harmful_preservation=kept,
        control={o: control(o, success, benign, refused, base) for o in ("two", "three")},
        passes={o: passes(o, benign, kept, drift, n_harmful, limits) for o in ("two", "three")},
    )
