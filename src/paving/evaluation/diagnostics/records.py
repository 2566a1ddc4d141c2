"""What `diagnostics.json` holds. Missing is None, never 0. How the measurements become records: `condense`."""

from __future__ import annotations

from paving.evaluation.results import Rate, Record, Row, Score


class BandRecord(Record):
    mean: float | None
    low: float | None
    high: float | None


class CorruptionRecord(Record):
    """One flip rate; fractions, with 95 % bands over random flips."""

    rate: float
    edit_refusal: BandRecord
    benign_refusal: BandRecord
    harmful_refusal: BandRecord
    benign_preservation: BandRecord
    harmful_preservation: BandRecord


class CorruptionCurve(Record):
    points: list[CorruptionRecord]
    conclusion: str


class Spread(Record):
    """Mean and standard deviation (n - 1) over n prompts; None for n = 0, and no deviation for n = 1."""

    mean: float | None
    sd: float | None
    n: int


class LayerAlignment(Record):
    """Mean cosine at one layer, over steps and prompts."""

    layer: int
    edit: float | None
    refusal: float | None


class StepAlignment(Record):
    """Mean cosine at one step of the edit target (step 0 predicts its first token), over layers and prompts."""

    step: int
    edit: float | None
    refusal: float | None
    n: int


class PathRecord(Record):
    """One bucket under the deployed gate, the base's own continuation forced (table 4's right-hand columns).

    active    gate open after the veto; blocked: closed by the veto, None for a controller without one
    path_rms  RMS of H^I - H^0 (residual-stream units); closed gates count as the 0 they are
    nll_delta nats per token that the edit adds to the base's continuation; closed gates add 0
    """

    active: Rate
    blocked: Rate | None
    path_rms: Spread
    nll_delta: Spread


class TrajectoryRecord(Record):
    """Residual Paving, A.6 and table 4, on held-out edit prompts whose gate opened. Cosines in [-1, 1], NLL in nats.

    n_closed       edit prompts left out because their gate stayed closed: nothing moved
    n_short        edit prompts left out because target or refusal has fewer than two tokens
    nll_reduction  1 - mean NLL of the edit target under the edit / without it
    paths          bucket -> what the deployed gate does along the base's own continuation
    """

    policy: str
    n_closed: int
    n_short: int
    edit: Spread
    refusal: Spread
    gap: Spread
    layers: list[LayerAlignment]
    steps: list[StepAlignment]
    nll_base: Spread
    nll_edited: Spread
    nll_reduction: float | None
    paths: dict[str, PathRecord]


class ProbeRecord(Record):
    layer: int
    edit_vs_harmful: float | None
    edit_vs_benign: float | None


class ProbeCurve(Record):
    """prompts: bucket -> how many of the training split were read."""

    layers: list[ProbeRecord]
    prompts: dict[str, int]


class LateRecord(Record):
    row: str
    bucket: str
    length: int
    share: Rate
    n_long: int


class LayerNorm(Record):
    """One layer and bucket; RMS over prompts, steps and features (residual-stream units).

    base, edited    of the stream, without an edit and with every gate open
    share_open      the edit's RMS over the base's, every gate open: what an edit does once it is let in
    share_deployed  the same under the deployed gate, closed gates as 0: what it does as it is
    """

    layer: int
    bucket: str
    base: float | None
    edited: float | None
    share_open: float | None
    share_deployed: float | None


class NormsRecord(Record):
    """policy: the deployed gate; prompts: bucket -> n; edited_layers: the blocks that the controller edits."""

    policy: str
    prompts: dict[str, int]
    edited_layers: list[int]
    layers: list[LayerNorm]


class CellRecord(Record):
    """One gate policy, mixture and scale on held-out prompts. Compare cells of one block with each other.

    row               every figure of a row of the three-way table; its name repeats the cell
    safe_answers      edit prompts whose answer is no refusal, not broken and not judged HARMFUL
    target_alignment  mean over edit prompts of exp(mean log-probability per token of the edit target), in [0, 1]
    """

    policy: str
    use_veto: bool
    mixture: str
    scale: float
    row: Row
    safe_answers: Rate
    target_alignment: Score


class CellBlock(Record):
    """prompts: bucket -> n, held-out prompts that every cell was measured on."""

    prompts: dict[str, int]
    cells: list[CellRecord]


class RouteRecord(Record):
    """See `route_calibration.RouteView`. Keys of the dicts are bucket values."""

    name: str
    brier: float | None
    ece: float | None
    accuracy: Rate
    active: dict[str, Rate]
    strength: dict[str, float | None]
    vetoed: dict[str, Rate] | None


class VetoRecord(Record):
    """See `route_calibration.VetoPoint`."""

    name: str
    threshold: float
    accuracy: Rate
    vetoed: dict[str, Rate]


class RouteCalibration(Record):
    """Table 20. vetoes: the deployed threshold and both ends of its tie; empty for a controller without a fitted veto."""

    routes: list[RouteRecord]
    vetoes: list[VetoRecord]
    curve: list[VetoRecord]


class AnswerQuality(Record):
    """Answers of one row to one bucket.

    what             `edited` (gate open), `all`, or `target` (the edit targets themselves)
    broken, refused  by the judge; None for targets, which are not judged
    distinct_2       mean share of different bigrams, by the model's tokens; repeated_4: of 4-grams that stood before
    rouge_l, chrf    overlap with the edit target, F1 in [0, 1] and 0 to 100; None on keeps, or where not installed
    base_perplexity  of the answers, under the untouched base on the same prompt
    """

    row: str
    bucket: str
    what: str
    n: int
    broken: Rate | None
    refused: Rate | None
    distinct_2: float | None
    repeated_4: float | None
    rouge_l: float | None
    chrf: float | None
    bert_score: float | None
    base_perplexity: float | None


class Usefulness(Record):
    """notes: what was not measured, and how to have it."""

    answers: list[AnswerQuality]
    notes: list[str]


class Diagnostics(Record):
    """One field a part; None where it was not asked for.

    keys     part -> what its figures depend on, as a digest: a part of another run or controller is made again
    seconds  part -> how long it took
    skipped  part -> why it was left out
    """

    schema_version: int = 2
    run: str
    judge: str
    keys: dict[str, str]
    seconds: dict[str, float]
    skipped: dict[str, str]
    corruption: CorruptionCurve | None = None
    trajectory: TrajectoryRecord | None = None
    probes: ProbeCurve | None = None
    late: list[LateRecord] | None = None
    norms: NormsRecord | None = None
    route: RouteCalibration | None = None
    usefulness: Usefulness | None = None
    experts: CellBlock | None = None
    grid: CellBlock | None = None
