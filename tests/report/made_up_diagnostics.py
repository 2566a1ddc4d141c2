"""Diagnostics that were never measured: every number here is made up for the tests of the report."""

from __future__ import annotations

from paving.evaluation.diagnostics import records as r
from paving.evaluation.results import Score
from paving.evaluation.statistics import wilson
from paving.prompts.types import Bucket

E, B, H = (b.value for b in Bucket)


def rates(e, b, h, n=10):
    return {E: wilson(e, n), B: wilson(b, n), H: wilson(h, n)}


def cell(metrics, policy, mixture, scale, safe, refused_harmful, veto=False):
    row = metrics.rows[1]
    row = row.model_copy(update={"refusal": {**row.refusal, H: wilson(refused_harmful, 10)}})
    return r.CellRecord(
        policy=policy, use_veto=veto, mixture=mixture, scale=scale, row=row, safe_answers=wilson(safe, 10),
        target_alignment=Score(value=0.25, n=10),
    )  # fmt: skip


def experts(metrics) -> r.CellBlock:
    made = [("router", 8), ("uniform", 7), ("expert:0", 2), ("expert:1", 6), ("without:0", 5), ("without:1", 1)]
    return r.CellBlock(
        prompts={E: 10, B: 10, H: 10}, cells=[cell(metrics, "thresholded", m, 1.0, k, 9, veto=True) for m, k in made]
    )


def grid(metrics) -> r.CellBlock:
    cells = [
        cell(metrics, policy, mixture, scale, 3 + i, 9 - i)
        for policy in ("hard", "oracle")
        for mixture in ("router", "uniform")
        for i, scale in enumerate((0.5, 1.0, 2.0))
    ]
    return r.CellBlock(prompts={E: 10, B: 10, H: 10}, cells=cells)


def route() -> r.RouteCalibration:
    view = r.RouteRecord(
        name="hard + veto", brier=0.049, ece=0.06, accuracy=wilson(28, 30), active=rates(9, 0, 1),
        strength={E: 7.2, B: 0.2, H: None}, vetoed=rates(0, 0, 9),
    )  # fmt: skip
    point = r.VetoRecord(name="high threshold", threshold=1.0, accuracy=wilson(27, 30), vetoed=rates(0, 0, 9))
    points = [point, point.model_copy(update={"name": "low threshold", "threshold": 0.0})]
    return r.RouteCalibration(routes=[view, view.model_copy(update={"vetoed": None})], vetoes=points, curve=points[::-1])


def norms() -> r.NormsRecord:
    layers = [
        r.LayerNorm(layer=i, bucket=b, base=1.0 + i, edited=1.5 + i, share_open=0.1 * i, share_deployed=0.05 * i)
        for b in (E, B)
        for i in range(6)
    ]
    return r.NormsRecord(policy="hard", prompts={E: 10, B: 10, H: 0}, edited_layers=[2, 3], layers=layers)


def usefulness() -> r.Usefulness:
    base = r.AnswerQuality(
        row="base", bucket=B, what="all", n=10, broken=wilson(0, 10), refused=wilson(0, 10), distinct_2=0.9, repeated_4=0.02,
        rouge_l=None, chrf=None, bert_score=None, base_perplexity=1.5,
    )  # fmt: skip
    edited = {"row": "learned", "bucket": E, "what": "edited", "n": 8, "broken": wilson(2, 8), "repeated_4": 0.25}
    rows = [base, base.model_copy(update=edited)]
    return r.Usefulness(answers=rows, notes=["ROUGE-L and chrF were not measured: install it"])


def corruption() -> r.CorruptionCurve:
    """A router whose keeps fall as gates are flipped."""

    def band(mean: float) -> r.BandRecord:
        return r.BandRecord(mean=mean, low=max(0.0, mean - 0.03), high=min(1.0, mean + 0.03))

    points = [
        r.CorruptionRecord(
            rate=i / 10,
            edit_refusal=band(0.01 + 0.08 * i),
            benign_refusal=band(0.02),
            harmful_refusal=band(0.8 - 0.05 * i),
            benign_preservation=band(1 - 0.03 * i),
            harmful_preservation=band(1 - 0.05 * i),
        )
        for i in range(11)
    ]
    return r.CorruptionCurve(points=points, conclusion="The keeps fall as gates are flipped: routing is what limits here.")


def trajectory() -> r.TrajectoryRecord:
    def spread(mean: float, n: int = 474) -> r.Spread:
        return r.Spread(mean=mean, sd=0.12, n=n)

    path = r.PathRecord(active=wilson(9, 10), blocked=wilson(0, 10), path_rms=spread(0.1, 10), nll_delta=spread(0.02, 10))
    return r.TrajectoryRecord(
        policy="thresholded",
        n_closed=26,
        n_short=0,
        edit=spread(0.41),
        refusal=spread(-0.05),
        gap=spread(0.46),
        layers=[r.LayerAlignment(layer=i, edit=0.1 + 0.02 * i, refusal=0.05 - 0.01 * i) for i in range(5, 30)],
        steps=[r.StepAlignment(step=i, edit=0.6 - 0.03 * i, refusal=-0.1 + 0.01 * i, n=480 - 30 * i) for i in range(1, 13)],
        nll_base=spread(3.1),
        nll_edited=spread(1.2),
        nll_reduction=0.61,
        paths={b.value: path for b in Bucket},
    )


def late() -> list[r.LateRecord]:
    return [
        r.LateRecord(row=name, bucket=bucket, length=length, share=wilson(k, n), n_long=n - k)
        for name in ("base", "learned")
        for bucket, n in ((E, 443), (B, 0), (H, 80))
        for length, k in ((16, n // 5), (32, n // 50))
    ]


def made_up_diagnostics(metrics) -> r.Diagnostics:
    """Every part there is."""
    probes = [r.ProbeRecord(layer=i, edit_vs_harmful=0.7 + i / 120, edit_vs_benign=0.99) for i in range(30)]
    return r.Diagnostics(
        run=metrics.run, judge=metrics.judge, keys={}, seconds={}, skipped={}, corruption=corruption(),
        trajectory=trajectory(), probes=r.ProbeCurve(layers=probes, prompts={E: 1000, B: 1000, H: 192}), late=late(),
        norms=norms(), route=route(), usefulness=usefulness(), experts=experts(metrics), grid=grid(metrics),
    )  # fmt: skip
