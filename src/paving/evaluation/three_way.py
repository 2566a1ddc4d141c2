"""The three-way protocol: every intervention on the same held-out prompts, decoded, judged and compared with the base.

Knows interventions only through their protocol. Completions and verdicts are saved a row at a time; a second call
with the same arguments takes finished rows from disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from paving.backbone import Backbone
from paving.evaluation.judges import Judge, Label
from paving.evaluation.judging import journal_of, judge_file
from paving.evaluation.verdicts import read_verdicts
from paving.generation import (
    TRANSFORMERS,
    Completion,
    Decoding,
    Engine,
    Transformers,
    load_completions,
    save_completions,
)
from paving.intervention import Identity, Intervention
from paving.processes import once
from paving.prompts.types import Bucket, Prompt
from paving.traces.completions import base_continuations
from paving.traces.preservation import keep_divergence
from paving.traces.store import TraceStore

HORIZON = 12  # tokens of the base's continuation that preservation looks at, whatever a controller was trained on
KEEPS = (Bucket.BENIGN_KEEP, Bucket.HARMFUL_KEEP)
Stage = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class RowSpec:
    """One row of the table.

    key     identifies the intervention's state, so that saved completions are not taken for those of another controller
    editor  rows that share one do the same to a prompt wherever they decide the same: same experts, same scale
    """

    intervention: Intervention
    kind: str
    policy: str
    scale: float | None
    key: str
    editor: str | None = None


@dataclass(frozen=True)
class Measured:
    """What one row did with every held-out prompt.

    labels      one for each completion, in its order
    divergence  keep's id -> mean KL(base || row) along the base's continuation (nats)
    """

    spec: RowSpec
    completions: Sequence[Completion]
    labels: Sequence[Label]
    divergence: Mapping[str, float]

    def refused(self, bucket: Bucket) -> dict[str, bool]:
        pairs = zip(self.completions, self.labels, strict=True)
        return {c.id: label is Label.HARMLESS_REFUSAL for c, label in pairs if c.bucket == bucket}


@dataclass(frozen=True)
class Protocol:
    """What all rows share. horizon and k: steps and support of the preservation score (A.2). by_row: see `generate`.

    engine  decodes the answers; preservation is measured with the backbone whatever it is
    """

    decoding: Decoding
    judge: Judge
    horizon: int = HORIZON
    k: int = 1024
    batch_size: int = 32
    by_row: bool = False
    engine: Engine = field(default_factory=Transformers)


def three_way(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    specs: Sequence[RowSpec],
    protocol: Protocol,
    store: TraceStore,
    folder: Path,
    stage: Stage,
    *,
    verdicts: Path | None = None,
) -> list[Measured]:
    """The untouched base and every spec, in that order, on the same prompts.

    folder:   keeps completions/ and divergence/, which no judge has a part in, and verdicts/ unless `verdicts` says where
    """
    verdicts = verdicts or folder / "verdicts"
    keeps = [p for p in prompts if p.bucket in KEEPS]
    continuations = base_continuations(
        backbone, store, keeps, protocol.horizon, tick=stage("base continuations (held-out keeps)", len(keeps))
    )
    done: list[Measured] = []
    for spec in (RowSpec(Identity(), "reference", "none", None, "base"), *specs):
        known = [{c.id: c for c in m.completions} for m in done if _does_the_same(m.spec, spec)]
        completions = completions_of(backbone, prompts, spec, protocol, folder, known, stage)
        file = f"{spec.intervention.name}.jsonl"
        labels = judged(folder / "completions" / file, protocol.judge, verdicts / file, stage)
        if isinstance(spec.intervention, Identity):
            divergence = {p.id: 0.0 for p in keeps}  # of the base from itself
        else:
            opened = {c.id for c in completions if c.gate > 0}  # as the answers were decided, see `divergence_of`
            divergence = divergence_of(backbone, keeps, opened, continuations, spec, protocol, folder, stage)
        done.append(Measured(spec, completions, labels, divergence))
    return done


def _does_the_same(earlier: RowSpec, spec: RowSpec) -> bool:
    """Wherever both decide the same. The base decides nothing but closed gates, which are its own in every row."""
    return isinstance(earlier.intervention, Identity) or (spec.editor is not None and earlier.editor == spec.editor)


def completions_of(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    spec: RowSpec,
    protocol: Protocol,
    folder: Path,
    known: Sequence[Mapping[str, Completion]],
    stage: Stage,
) -> list[Completion]:
    """Decode a row bucket by bucket, or take it from disk where exactly this row was decoded before."""
    path = folder / "completions" / f"{spec.intervention.name}.jsonl"
    how = {"decoding": protocol.decoding.model_dump(), "batch": protocol.batch_size}
    if protocol.engine.key != TRANSFORMERS:  # answers of before there were engines have none in their key
        how["engine"] = protocol.engine.key
    key = _key(backbone, prompts, spec, **how)
    tick = stage(f"answers: {spec.intervention.name}", len(prompts))
    if _is_there(path, key):
        tick(len(prompts))
        return load_completions(path)
    completions = []
    # Bucket by bucket, so that a batch of keeps whose gates all stay closed need not be decoded again.
    for bucket in Bucket:
        chosen = [p for p in prompts if p.bucket == bucket]
        completions += protocol.engine.generate(
            backbone,
            chosen,
            spec.intervention,
            protocol.decoding,
            batch_size=protocol.batch_size,
            known=known,
            by_row=protocol.by_row,
            tick=tick,
        )
    with _keyed(path, key):
        save_completions(completions, path)
    return completions


def divergence_of(
    backbone: Backbone,
    keeps: Sequence[Prompt],
    opened: Collection[str],
    continuations: Mapping[str, tuple[int, ...]],
    spec: RowSpec,
    protocol: Protocol,
    folder: Path,
    stage: Stage,
) -> dict[str, float]:
    """Keep's id -> mean KL to the base (nats), measured, or taken from disk likewise.

    opened: ids whose gate was open when the row was decoded. Only they are measured, the others are 0: decided again in
            other batches, a gate at its threshold could fall the other way, and one row would rest on two decisions
    """
    path = folder / "divergence" / f"{spec.intervention.name}.json"
    key = _key(backbone, keeps, spec, horizon=protocol.horizon, k=protocol.k, opened=sorted(opened & {p.id for p in keeps}))
    tick = stage(f"preservation: {spec.intervention.name}", len(keeps))
    if _is_there(path, key):
        tick(len(keeps))
        return json.loads(path.read_text(encoding="utf-8"))
    moved = [p for p in keeps if p.id in opened]
    tick(len(keeps) - len(moved))
    found = keep_divergence(backbone, moved, continuations, spec.intervention, k=protocol.k, tick=tick)
    divergence = {p.id: found.get(p.id, 0.0) for p in keeps}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _keyed(path, key):
        path.write_text(json.dumps(divergence, indent=0), encoding="utf-8")
    return divergence


def _key(backbone: Backbone, prompts: Sequence[Prompt], spec: RowSpec, **how: object) -> str:
    return TraceStore.key(
        base=backbone.fingerprint,
        dtype=str(backbone.dtype),
        spec=spec.key,
        prompts=[(p.id, *p.asked) for p in prompts],
        **how,
    )


def _is_there(path: Path, key: str) -> bool:
    key_path = path.with_suffix(".key")
    return path.exists() and key_path.exists() and key_path.read_text(encoding="utf-8") == key


@contextmanager
def _keyed(path: Path, key: str) -> Iterator[None]:
    """The old key goes before anything is written and the new one comes after, so that a kill in between never leaves
    a key beside a file that is not its own."""
    key_path = path.with_suffix(".key")
    key_path.unlink(missing_ok=True)
    yield
    key_path.write_text(key, encoding="utf-8")


def judged(completions: Path, judge: Judge, out: Path, stage: Stage) -> list[Label]:
    """A label for every saved completion, in order; verdicts given before on the same text are taken from `out`.

    Judging never generates. Of several processes the first judges, and has the file.
    """
    return once(lambda: _judged(completions, judge, out, stage))


def _judged(completions: Path, judge: Judge, out: Path, stage: Stage) -> list[Label]:
    if out.exists():
        earlier = next(read_verdicts(out), None)
        if earlier is not None and earlier.judge == judge.name and earlier.key is not None:
            out.replace(journal_of(out))  # where verdicts are taken from by content, also if the answers have changed
        else:
            # Another judge's, or without keys: of no use here, but somebody may have paid for them.
            out.replace(out.with_name(f"{out.name}.earlier"))
    judge_file(completions, judge, out, stage)
    journal_of(out).unlink(missing_ok=True)  # verdicts on answers that are no more
    return [line.label for line in read_verdicts(out)]
