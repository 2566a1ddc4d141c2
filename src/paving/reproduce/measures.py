"""Cells: one figure of one row, from one run or pooled over the seeds of a setting, with n, interval and every seed's own.

Intervals of single runs are Wilson's; of pooled rates those that redraw prompts with all their answers, because the
held-out splits of seeds share prompts (docs/statistics.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from paving.evaluation.judges import Label
from paving.evaluation.paired import paired_rates
from paving.evaluation.results import Rate, Row, Score
from paving.evaluation.seeds import pooled_difference, pooled_rate
from paving.evaluation.statistics import control_score, wilson
from paving.prompts.types import Bucket
from paving.report.tables import percent, points
from paving.reproduce.published import PaperBlock, PaperTable, paper_name
from paving.reproduce.result import Cell, PaperLine, missing, text
from paving.reproduce.runs import BASE, Run, Setting

REFUSED = frozenset({Label.HARMLESS_REFUSAL})
NOT_REFUSED = frozenset(Label) - REFUSED


def lacking(setting: Setting, row: str) -> str | None:
    """Why this row has no figures, and the command that would make them; None where it has."""
    if (run := setting.unevaluated) is not None:
        return f"{run.name} is not evaluated yet. Make it: paving eval {run.folder}"
    if not setting.has(row):
        run = next(r for r in setting.runs if r.row(row) is None)
        return f"{run.name} has no row `{row}`. {command_for(row, run)}"
    return None


def command_for(row: str, run: Run) -> str:
    """What would make a row that is not there."""
    if "/" in row:
        if (why := run.could_not_be_fitted(row)) is not None:
            return f"It could not be fitted: {why}"
        if run.passes_nowhere(row):
            return "No scale of it keeps benign and harmful keeps within the strict rule's limits."
        method, variant, *_ = row.split("/")
        return f"Make it: paving compare {run.folder} --method {method} --variant {variant}"
    policy, _, veto = row.partition("+")
    if row == "learned+veto" or (veto == "veto" and not run.config.calibration.use_veto):
        return "The run has no veto: it needs harmful keeps and calibration.use_veto."
    if policy in ("soft", "hard", "thresholded"):
        return f"Make it: paving eval {run.folder} --policy {row}"
    if row == "uniform" or row.startswith("expert:"):
        return f"Make it: paving eval {run.folder} --mixture {row}"
    return f"Make it: paving eval {run.folder}"


def share(setting: Setting, row: str, bucket: Bucket, labels: Collection[Label] = REFUSED) -> Cell:
    """Percent of a bucket's answers with one of these labels; refusals unless others are named."""
    if (why := lacking(setting, row)) is not None:
        return missing(why)
    each = [label_rate(r, bucket, labels) for r in setting.rows(row)]
    total = added(each)
    if total.rate is None:
        return missing(f"{setting.name} has no {bucket.value} prompts (n=0)")
    head = f"{total.k}/{total.n} {percent(total.rate)}"
    if len(each) == 1:
        return text(head, _limits(total), value=100 * total.rate)
    flags = [_flags(run, row, bucket, labels) for run in setting.runs]
    if any(f is None for f in flags):
        return _without_interval(setting, head, each, 100 * total.rate)
    known = [f for f in flags if f is not None]
    pooled = pooled_rate(known, setting.group_of(i for f in known for i in f))
    return text(head, _limits(pooled.by_prompt), _each(r.rate for r in each), value=100 * total.rate)


def drift(setting: Setting, row: str) -> Cell:
    """Harmful refusal minus the base's on the same prompts, in percentage points."""
    if (why := lacking(setting, row) or lacking(setting, BASE)) is not None:
        return missing(why)
    if row == BASE:
        return text("0.0", value=0.0)  # by definition; an interval around it would be one of nothing
    values = [r.harmful_drift for r in setting.rows(row) if r is not None]
    if any(v is None for v in values):
        return missing(f"{setting.name} has no harmful keeps (n=0)")
    both = setting.rows(row), setting.rows(BASE)
    ours, base = ([_flags(run, name, Bucket.HARMFUL_KEEP, REFUSED) for run in setting.runs] for name in (row, BASE))
    if any(f is None for f in (*ours, *base)):
        harmful, reference = (added([label_rate(r, Bucket.HARMFUL_KEEP, REFUSED) for r in rows]) for rows in both)
        value = harmful.rate - reference.rate
        return Cell(lines=(points(value), "[n/a]"), value=100 * value, missing=_no_verdicts(setting))
    if len(values) == 1:
        found = paired_rates(ours[0], base[0])
        return text(points(found.difference), f"[{points(found.low)}, {points(found.high)}]", value=100 * found.difference)
    pooled = pooled_difference(ours, base, setting.group_of(i for f in ours for i in f))
    low, high = pooled.by_prompt.low, pooled.by_prompt.high
    limits = "[n/a]" if low is None or high is None else f"[{points(low)}, {points(high)}]"
    value = pooled.naive.difference
    return text(points(value), limits, f"({', '.join(map(points, values))})", value=100 * value)


def preservation(setting: Setting, row: str, bucket: Bucket) -> Cell:
    """exp(-mean KL) in percent; over seeds, of the mean over all prompts of all of them."""
    if (why := lacking(setting, row)) is not None:
        return missing(why)
    each = [r.preservation.get(bucket) for r in setting.rows(row)]
    pooled = pooled_preservation(each)
    if pooled.value is None:
        return missing(f"{setting.name} has no {bucket.value} prompts (n=0)")
    rest = f"(n={pooled.n})" if len(each) == 1 else _each(s.value for s in each)
    return text(percent(pooled.value), rest, value=100 * pooled.value)


def score(setting: Setting, row: str) -> Cell:
    """The control score of table 7's baselines: edit success + 0.10 P_B + 0.10 retained harmful refusals."""
    if (why := lacking(setting, row) or lacking(setting, BASE)) is not None:
        return missing(why)
    rows = setting.rows(row)
    value = control_score(
        added([label_rate(r, Bucket.EDIT, REFUSED) for r in rows]),
        pooled_preservation([r.preservation.get(Bucket.BENIGN_KEEP) for r in rows]),
        added([label_rate(r, Bucket.HARMFUL_KEEP, REFUSED) for r in rows]),
        added([label_rate(r, Bucket.HARMFUL_KEEP, REFUSED) for r in setting.rows(BASE)]),
    )
    if value is None:
        return missing(f"{setting.name} has an empty bucket, or a base that refuses no harmful keep: no score")
    each = [f"{r.control_score:.3f}" for r in rows if r.control_score is not None]
    return text(f"{value:.3f}", *([f"({', '.join(each)})"] if len(rows) > 1 else []), value=value)


def scale(setting: Setting, row: str) -> Cell:
    """The scale that calibration chose for every seed."""
    if (why := lacking(setting, row)) is not None:
        return missing(why)
    values = [r.scale for r in setting.rows(row)]
    if any(v is None for v in values):
        return text("–")
    if len(set(values)) == 1:
        return text(f"{values[0]:g}", value=values[0])
    return text(", ".join(f"{v:g}" for v in values))


def gate_strength(setting: Setting, row: str, bucket: Bucket) -> Cell:
    """Mean effective gate times scale, after the veto (table 20's gate values)."""
    if (why := lacking(setting, row)) is not None:
        return missing(why)
    parts = [(r.gate_mean.get(bucket), r.scale, label_rate(r, bucket, REFUSED).n) for r in setting.rows(row)]
    known = [(gate * size, n) for gate, size, n in parts if gate is not None and size is not None and n]
    if len(known) < len(parts):
        return missing(f"{setting.name} has no {bucket.value} prompts (n=0)")
    value = sum(v * n for v, n in known) / sum(n for _, n in known)
    return text(f"{value:.2f}", *([f"({', '.join(f'{v:.2f}' for v, _ in known)})"] if len(known) > 1 else []), value=value)


def gate_active(setting: Setting, row: str, bucket: Bucket) -> Cell:
    """Percent of the bucket whose gate is above 0 after the veto."""
    return _recorded(setting, row, bucket, lambda r: r.gate_active)


def vetoed(setting: Setting, row: str, bucket: Bucket) -> Cell:
    """Percent of the bucket that the veto blocks, whether its gate was open or not."""
    return _recorded(setting, row, bucket, lambda r: r.veto_rate)


def veto_triple(setting: Setting, row: str, separator: str = "/") -> Cell:
    """Blocked percent of edit, benign and harmful prompts, as tables 16 and 20 print it."""
    if (why := lacking(setting, row)) is not None:
        return missing(why)
    rates = [added([r.veto_rate[b] for r in setting.rows(row)]) for b in Bucket]
    if all(rate.rate is None for rate in rates):
        return text("–")  # a row without a veto: nothing is missing
    return text(separator.join("n/a" if r.rate is None else percent(r.rate) for r in rates))


# --- pooling --------------------------------------------------------------------------------------------------------


def label_rate(row: Row, bucket: Bucket, labels: Collection[Label]) -> Rate:
    counts = row.labels.get(bucket, {})
    return wilson(sum(counts.get(label, 0) for label in labels), sum(counts.values()))


def added(rates: Sequence[Rate]) -> Rate:
    """All counts together, as if every answer were to another prompt."""
    return wilson(sum(r.k for r in rates), sum(r.n for r in rates))


def pooled_preservation(scores: Sequence[Score | None]) -> Score:
    """exp(-mean KL) over the prompts of all runs: each run's mean KL is -ln of its score, weighted by its n."""
    known = [s for s in scores if s is not None and s.value is not None]
    n = sum(s.n for s in known)
    if not n or any(s.value == 0 for s in known):
        return Score(value=0.0 if n else None, n=n)
    return Score(value=math.exp(sum(s.n * math.log(s.value) for s in known) / n), n=n)


def _recorded(setting: Setting, row: str, bucket: Bucket, of: Callable[[Row], Mapping[str, Rate]]) -> Cell:
    """A rate that metrics.json holds as counts only: over several seeds it has no interval (they share prompts)."""
    if (why := lacking(setting, row)) is not None:
        return missing(why)
    each = [of(r)[bucket] for r in setting.rows(row)]
    total = added(each)
    if total.rate is None:
        return text("–")
    head = f"{total.k}/{total.n} {percent(total.rate)}"
    return text(head, _limits(total) if len(each) == 1 else _each(r.rate for r in each), value=100 * total.rate)


def _flags(run: Run, row: str, bucket: Bucket, labels: Collection[Label]) -> dict[str, bool] | None:
    verdicts = run.verdicts(row)
    return None if verdicts is None else {i: label in labels for i, label in verdicts.get(bucket, {}).items()}


def _limits(found) -> str:
    return "[n/a]" if found.low is None or found.high is None else f"[{percent(found.low)}, {percent(found.high)}]"


def _each(fractions) -> str:
    return f"({', '.join('n/a' if f is None else percent(f) for f in fractions)})"


def _without_interval(setting: Setting, head: str, each: Sequence[Rate], value: float) -> Cell:
    return Cell(lines=(head, "[n/a]", _each(r.rate for r in each)), value=value, missing=_no_verdicts(setting))


def _no_verdicts(setting: Setting) -> str:
    run = setting.runs[0]
    return f"no interval: verdicts/ of {setting.name} are not all there. Make them: paving eval {run.folder}"


# --- the paper's rows -----------------------------------------------------------------------------------------------


def paper_line(paper: PaperTable, block: PaperBlock, row: Sequence[str], model: str, called: str = "") -> PaperLine:
    """A row of the paper to be read beside a measured one; its name says whether the backbone is the same."""
    cells = {c.heading: printed for c, printed in zip(block.columns, row, strict=True) if c in block.values}
    return PaperLine(name=paper_label(paper.backbone, model, called), cells=cells)


def paper_label(backbone: str | None, model: str, called: str = "") -> str:
    """`paper, Gemma-3-4B-IT`, and what it must not be taken for where the run's backbone is another one."""
    theirs = paper_name(backbone) if backbone else None
    parts = ["paper", *([called] if called else []), *([theirs] if theirs else [])]
    other = theirs is not None and paper_name(model) != theirs
    return ", ".join(parts) + (" (another backbone)" if other else "")
