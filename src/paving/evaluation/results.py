"""What `metrics.json` holds: every figure of a run, each with its n. Missing is None, never 0."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rate(Record):
    """k of n, with the Wilson 95 % interval (where prompts share groups: of as many independent answers as they are worth).
    rate, low and high are fractions in [0, 1]; all None when n == 0."""

    k: int
    n: int
    rate: float | None
    low: float | None
    high: float | None


class Score(Record):
    """A preservation score in [0, 1] (Residual Paving, A.2) over n prompts; None when n == 0."""

    value: float | None
    n: int


class PairedRates(Record):
    """One row against a reference row on n shared prompts. difference, low and high are fractions in [-1, 1].

    only_row and only_reference are McNemar's discordant counts b and c: prompts that one of the two refused and the
    other did not. difference = (only_row - only_reference) / n, so a row that refuses less has a negative one. The
    limits are Tango's 95 % score interval (where prompts share groups: of as many independent pairs as they are worth), p is
    McNemar's exact two-sided test, by prompt. All four are None when n == 0.
    """

    n: int
    only_row: int
    only_reference: int
    difference: float | None
    low: float | None
    high: float | None
    p: float | None


class Resampled(Record):
    """A figure over n values in so many groups, with its 95 % interval.

    value is None when n == 0; low, high and the standard error se (of redrawn figures) also with a single group, whose
    redrawing can show nothing.
    """

    value: float | None
    low: float | None
    high: float | None
    se: float | None
    n: int
    groups: int


class Row(Record):
    """One intervention on the held-out split. Keys of the dicts are bucket values: edit, benign_keep, harmful_keep."""

    name: str  # "base", "learned", "learned+veto", "oracle", or any gate policy
    kind: str  # "reference" | "learned" | "diagnostic"
    policy: str
    scale: float | None
    refusal: dict[str, Rate]
    labels: dict[str, dict[str, int]]  # bucket -> label -> count
    preservation: dict[str, Score]  # benign_keep and harmful_keep
    harmful_drift: float | None  # Delta_H, a fraction: refusal[harmful_keep] - base's
    gate_active: dict[str, Rate]  # gate > 0 after the veto
    gate_mean: dict[str, float | None]  # mean effective gate, before the scale
    veto_rate: dict[str, Rate]
    control_score: float | None
    preservation_interval: dict[str, Resampled] = {}  # groups of prompts redrawn; keys as in `preservation`
    against_base: dict[str, PairedRates] = {}  # refusals of this row against the base's, prompt by prompt
    against_oracle: dict[str, PairedRates] = {}  # the same against oracle routing; empty for rows that are not learned


class OracleGaps(Record):
    """Residual Paving, eq. 7; fractions. Positive route gaps: keeps lost to routing. Positive edit gap: edits lost to it."""

    route_benign: float | None
    route_harmful: float | None
    edit: float | None


class OracleGapIntervals(Record):
    """`OracleGaps` (Residual Paving, eq. 7) with intervals: the same signs, the same fractions."""

    route_benign: Resampled
    route_harmful: Resampled
    edit: Resampled


class ThresholdPoint(Record):
    """Share of each bucket whose gate is active when the gate logit must exceed `threshold`; held-out prompts, no veto."""

    threshold: float
    active: dict[str, float | None]


class ScalePoint(Record):
    """One scale tried on the calibration split."""

    scale: float
    edit_refusal: Rate
    harmful_refusal: Rate
    benign_preservation: Score
    harmful_preservation: Score
    edit_broken: Rate
    score: float
    chosen: bool


class ReliabilityBin(Record):
    """Gate probability against the share of edit prompts among the held-out prompts in that bin."""

    low: float
    high: float
    n: int
    mean_probability: float | None
    edit_share: float | None


class RouterDiagnostics(Record):
    """Held-out gate probabilities per bucket, and how well they rank and calibrate."""

    probabilities: dict[str, list[float]]
    logits: dict[str, list[float]]
    veto_logits: dict[str, list[float]]
    threshold: float
    veto_threshold: float | None
    auc_edit_vs_harmful: float | None
    auc_edit_vs_benign: float | None
    brier: float | None
    ece: float | None
    reliability: list[ReliabilityBin]


class TrainingPoint(Record):
    """Mean losses of one epoch of one stage, in nats; absent terms are not in the dict."""

    stage: str
    epoch: int
    losses: dict[str, float]
    seconds: float


class Metrics(Record):
    schema_version: int = 1
    run: str
    model: str
    seed: int
    judge: str
    decoding: dict[str, Any]  # {"max_new_tokens": 64, "do_sample": False}
    engine: str = "transformers"  # what decoded the answers of every row
    buckets: dict[str, dict[str, int]]  # split -> bucket -> n
    filters: list[dict[str, Any]]  # counts before and after every filter
    rows: list[Row]
    oracle_gaps: OracleGaps
    oracle_gap_intervals: OracleGapIntervals | None = None
    power: dict[str, str] = {}  # bucket -> what so many held-out prompts can show, in a sentence
    gate: str | None = None  # what decides it and why, where a search chose it
    promises: list[str] = []  # what calibration promised of the gate, a sentence each
    thresholds: list[ThresholdPoint]
    scales: list[ScalePoint]
    router: RouterDiagnostics
    training: list[TrainingPoint]
