"""From what every row did to the figures of a table: rates, preservation, drift, and each row against its references."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from paving.evaluation.judges import Label
from paving.evaluation.power import bucket_power, sentence
from paving.evaluation.resampling import grouped_pair, grouped_rate, oracle_gap_intervals, preservation_interval
from paving.evaluation.results import OracleGapIntervals, OracleGaps, PairedRates, Rate, Row
from paving.evaluation.statistics import control_score, preservation_score
from paving.evaluation.three_way import KEEPS, Measured
from paving.generation import Completion
from paving.prompts.types import Bucket, Prompt

ORACLE = "oracle"


def table_rows(measured: Sequence[Measured], prompts: Sequence[Prompt]) -> list[Row]:
    """A Row for each, in order; measured[0] is the base. A learned row is held against the oracle of its own editor: the
    same experts at the same scale, so that they differ by routing alone."""
    base = measured[0]
    oracles = {m.spec.editor: m for m in reversed(measured) if m.spec.policy == ORACLE and m.spec.editor is not None}
    groups = {p.id: p.group for p in prompts}
    return [row_of(m, base, oracles.get(m.spec.editor) if m.spec.kind == "learned" else None, groups) for m in measured]


def row_of(m: Measured, base: Measured, oracle: Measured | None, groups: Mapping[str, str]) -> Row:
    """Every figure of one row. groups: prompt id -> group; oracle: None where it is not to be compared with."""
    by_bucket = {
        b.value: [(c, label) for c, label in zip(m.completions, m.labels, strict=True) if c.bucket == b] for b in Bucket
    }
    refusal = {b.value: refusal_rate(m, b, groups) for b in Bucket}

    def share(rows: Iterable[tuple[Completion, Label]], flag: Callable[[Completion], bool]) -> Rate:
        return grouped_rate({c.id: flag(c) for c, _ in rows}, groups)

    divergence = {b.value: _of(m, b) for b in KEEPS}
    preservation = {b: preservation_score(list(values.values())) for b, values in divergence.items()}
    harmful, base_harmful = refusal[Bucket.HARMFUL_KEEP], refusal_rate(base, Bucket.HARMFUL_KEEP, groups)
    return Row(
        name=m.spec.intervention.name,
        kind=m.spec.kind,
        policy=m.spec.policy,
        scale=m.spec.scale,
        refusal=refusal,
        labels={b: {label.value: [x for _, x in rows].count(label) for label in Label} for b, rows in by_bucket.items()},
        preservation=preservation,
        harmful_drift=_minus(harmful.rate, base_harmful.rate),
        gate_active={b: share(rows, lambda c: c.gate > 0) for b, rows in by_bucket.items()},
        gate_mean={b: sum(c.gate for c, _ in rows) / len(rows) if rows else None for b, rows in by_bucket.items()},
        veto_rate={
            b: share(((c, x) for c, x in rows if c.veto is not None), lambda c: c.veto) for b, rows in by_bucket.items()
        },
        control_score=control_score(refusal[Bucket.EDIT], preservation[Bucket.BENIGN_KEEP], harmful, base_harmful),
        preservation_interval={b: preservation_interval(values, groups) for b, values in divergence.items()},
        against_base={} if m is base else _against(m, base, groups),
        against_oracle={} if oracle is None else _against(m, oracle, groups),
    )


def refusal_rate(m: Measured, bucket: Bucket, groups: Mapping[str, str]) -> Rate:
    return grouped_rate(m.refused(bucket), groups)


def oracle_gaps(rows: Sequence[Row], learned: str, oracle: str = ORACLE) -> OracleGaps:
    """Eq. 7: keeps lost to routing (P_C oracle - learned) and edits lost to routing (R_E learned - oracle)."""
    found = {r.name: r for r in rows}
    if learned not in found or oracle not in found:
        return OracleGaps(route_benign=None, route_harmful=None, edit=None)
    a, b = found[learned], found[oracle]

    def route(bucket: Bucket) -> float | None:
        return _minus(b.preservation[bucket].value, a.preservation[bucket].value)

    return OracleGaps(
        route_benign=route(Bucket.BENIGN_KEEP),
        route_harmful=route(Bucket.HARMFUL_KEEP),
        edit=_minus(a.refusal[Bucket.EDIT].rate, b.refusal[Bucket.EDIT].rate),
    )


def gap_intervals(
    measured: Sequence[Measured], prompts: Sequence[Prompt], learned: str, oracle: str = ORACLE
) -> OracleGapIntervals | None:
    """The same gaps with intervals, groups of prompts redrawn; None where one of the two rows is not there."""
    found = {m.spec.intervention.name: m for m in measured}
    if learned not in found or oracle not in found:
        return None
    a, b = found[learned], found[oracle]
    return oracle_gap_intervals(
        (a.divergence, b.divergence),
        (a.refused(Bucket.EDIT), b.refused(Bucket.EDIT)),
        {p.id: p.bucket.value for p in prompts},
        {p.id: p.group for p in prompts},
    )


def power_sentences(prompts: Sequence[Prompt]) -> dict[str, str]:
    """Bucket value -> what a bucket of this many prompts can show at all."""
    sizes = {b: sum(p.bucket == b for p in prompts) for b in Bucket}
    return {b.value: sentence(b, bucket_power(n)) for b, n in sizes.items()}


def _of(m: Measured, bucket: Bucket) -> dict[str, float]:
    return {c.id: m.divergence[c.id] for c in m.completions if c.bucket == bucket}


def _against(m: Measured, reference: Measured, groups: Mapping[str, str]) -> dict[str, PairedRates]:
    return {b.value: grouped_pair(m.refused(b), reference.refused(b), groups) for b in Bucket}


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
