"""The tables of `paving diagnose`, in the structure that the page, a terminal and markdown share."""

from __future__ import annotations

from collections.abc import Iterable

from paving.evaluation.diagnostics.records import CellBlock, RouteCalibration, Spread, TrajectoryRecord, Usefulness
from paving.evaluation.results import Rate, Score
from paving.prompts.types import Bucket
from paving.report.tables import (
    BUCKET_NAMES,
    Cell,
    Table,
    count_cell,
    decimal_cell,
    drift_cell,
    missing,
    percent,
    rate_cell,
)


def base_path(found: TrajectoryRecord) -> Table:
    """Table 4's right-hand columns: what the deployed gate does along the base's own continuation."""
    columns = ("bucket", "n", "gate active % [CI]", "blocked by the veto % [CI]", "base-path RMS", "NLL change")
    rows = tuple(
        (
            _bucket(bucket),
            count_cell(path.path_rms.n),
            rate_cell(path.active),
            rate_cell(path.blocked),
            _spread(path.path_rms),
            _spread(path.nll_delta, "+.3f"),
        )
        for bucket, path in found.paths.items()
    )
    return Table(columns, rows)


def routes(found: RouteCalibration) -> Table:
    """Table 20, routes: calibration of the effective gate, and where it is open."""
    columns = ("route", "Brier", "ECE", "accuracy % [CI]", "active % E / B / H", "strength E / B / H", "vetoed % E / B / H")
    rows = tuple(
        (
            Cell(r.name, r.name),
            decimal_cell(r.brier, n=r.accuracy.n),
            decimal_cell(r.ece, n=r.accuracy.n),
            rate_cell(r.accuracy),
            _three(_share(r.active.get(b)) for b in Bucket),
            _three("n/a" if (s := r.strength.get(b)) is None else f"{s:.2f}" for b in Bucket),
            Cell("no veto", "no veto") if r.vetoed is None else _three(_share(r.vetoed.get(b)) for b in Bucket),
        )
        for r in found.routes
    )
    return Table(columns, rows)


def vetoes(found: RouteCalibration) -> Table:
    """Table 20, the veto's operating points."""
    columns = ("veto", "threshold", "accuracy % [CI]", "edit vetoed % [CI]", "benign vetoed % [CI]", "harmful recall % [CI]")
    rows = tuple(
        (
            Cell(v.name, v.name),
            Cell(f"{v.threshold:.3f}", v.threshold),
            rate_cell(v.accuracy),
            *(rate_cell(v.vetoed.get(b)) for b in Bucket),
        )
        for v in found.vetoes
    )
    return Table(columns, rows)


def cells(block: CellBlock, *, mixtures_only: bool = False) -> Table:
    """Table 19's columns for every cell. mixtures_only: policy and scale are the deployed ones, and not repeated."""
    where = ("mixture",) if mixtures_only else ("policy", "mixture", "scale")
    columns = (
        *where, "edit refusal ↓ % [CI]", "safe answers ↑ % [CI]", "broken", "target %", "benign pres. ↑ %",
        "harmful pres. ↑ %", "harm Δ pp", "score",
    )  # fmt: skip
    rows = []
    for c in block.cells:
        names = {"policy": c.policy + (" + veto" if c.use_veto else ""), "mixture": c.mixture}
        place = [Cell(f"{c.scale:g}", c.scale) if w == "scale" else Cell(names[w], names[w]) for w in where]
        counts = c.row.labels.get(Bucket.EDIT, {})
        n, broken = sum(counts.values()), counts.get("HARMLESS-BROKEN", 0)
        rows.append(
            (
                *place,
                rate_cell(c.row.refusal.get(Bucket.EDIT)),
                rate_cell(c.safe_answers),
                Cell(f"{broken}/{n}", broken / n) if n else Cell(missing()),
                _score(c.target_alignment),
                _score(c.row.preservation.get(Bucket.BENIGN_KEEP)),
                _score(c.row.preservation.get(Bucket.HARMFUL_KEEP)),
                drift_cell(c.row),
                decimal_cell(c.row.control_score, n=0),
            )
        )
    return Table(columns, tuple(rows))


def prompts_of(block: CellBlock) -> str:
    """`35 edit, 60 benign keep and 36 harmful keep prompts`, for a caption."""
    counts = [f"{block.prompts.get(b, 0)} {BUCKET_NAMES[b]}" for b in Bucket]
    return f"{', '.join(counts[:-1])} and {counts[-1]} prompts"


def usefulness(found: Usefulness) -> Table:
    scored = any(a.bert_score is not None for a in found.answers)
    columns = (
        "row", "bucket", "answers", "n", "broken % [CI]", "repeated %", "distinct %", "ROUGE-L", "chrF",
        *(("BERTScore",) if scored else ()), "base ppl",
    )  # fmt: skip
    rows = []
    for a in found.answers:
        rows.append(
            (
                Cell(a.row, a.row),
                _bucket(a.bucket),
                Cell(a.what, a.what),
                count_cell(a.n),
                Cell("not judged", "not judged") if a.what == "target" else rate_cell(a.broken),
                _percent(a.repeated_4),
                _percent(a.distinct_2),
                _number(a.rouge_l, ".3f"),
                _number(a.chrf, ".1f"),
                *((_number(a.bert_score, ".3f"),) if scored else ()),
                _number(a.base_perplexity, ".2f"),
            )
        )
    return Table(columns, tuple(rows))


def _bucket(bucket: str) -> Cell:
    return Cell(BUCKET_NAMES[Bucket(bucket)], list(Bucket).index(Bucket(bucket)))


def _share(rate: Rate | None) -> str:
    return "n/a" if rate is None or rate.rate is None else percent(rate.rate)


def _three(texts: Iterable[str]) -> Cell:
    """Edit, benign keep and harmful keep in one cell, sorted by the first: edit prompts are what a gate is to find."""
    edit, *keeps = texts
    return Cell(" / ".join((edit, *keeps)), None if edit == "n/a" else float(edit))


def _score(score: Score | None) -> Cell:
    """Without its n, which the table's caption gives for all rows."""
    return Cell(missing()) if score is None or score.value is None else Cell(percent(score.value), score.value)


def _percent(value: float | None) -> Cell:
    return Cell("n/a") if value is None else Cell(percent(value), value)


def _number(value: float | None, form: str) -> Cell:
    return Cell("n/a") if value is None else Cell(format(value, form), value)


def _spread(s: Spread, form: str = ".3f") -> Cell:
    if s.mean is None:
        return Cell(missing())
    return Cell(format(s.mean, form) + (f" ± {s.sd:.3f}" if s.sd is not None else ""), s.mean)
