"""The picture of a comparison over several seeds: the one of `paving compare`, of pooled rates.

Each method and variant stands at the scale that the rule took on each seed; where it took none the base answers, as in the
tables' column of every seed. A method that was not measured on every seed is left out. Intervals redraw groups of prompts
with all their answers (docs/statistics.md).
"""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context

from comparison_tables import not_on_every_seed
from paving.evaluation.comparison import BASE, ComparedRow, Comparison, is_success
from paving.evaluation.judges import Label
from paving.evaluation.results import Rate
from paving.evaluation.seeds import pooled_difference, pooled_rate
from paving.prompts.types import Bucket
from paving.report.comparison_figures import draw_trade_off, is_own
from paving.report.svg import STYLE
from paving.reproduce.runs import Run, Setting

EDIT, HARMFUL = Bucket.EDIT.value, Bucket.HARMFUL_KEEP.value


def draw_pooled(setting: Setting, path: Path) -> None:
    """A PNG with a panel for each rule, three objectives."""
    found = pooled_comparison(setting)
    with rc_context({**STYLE, "savefig.facecolor": "white"}):
        draw_trade_off(found).savefig(path, dpi=160)


def pooled_comparison(setting: Setting) -> Comparison:
    """The first run's comparison with every row pooled over the runs that have it."""
    first = setting.runs[0].comparison
    rows = [pooled_row(setting, r.row.name, r, []) for r in first.rows if r.method == BASE or is_own(r)]
    every = {(c.method, c.variant): None for run in setting.runs for c in run.comparison.choices}
    for method, variant in every:
        for rule in ("control/three", "strict/three"):
            name = f"{method}/{variant}/{rule}"
            having = [run for run in setting.runs if run.row(name) is not None]
            if having and not_on_every_seed(setting, name) is None:
                rows.append(pooled_row(setting, name, having[0].compared(name), [rule]))
    return first.model_copy(update={"rows": rows})


def pooled_row(setting: Setting, name: str, like: ComparedRow, rules: list[str]) -> ComparedRow:
    """`like` with the success and the drift of all runs; named so that no row of a rule passes for the run's own."""
    ours = [{i: is_success(x) for i, x in labels(run, name, EDIT).items()} for run in setting.runs]
    success = pooled_rate(ours, setting.group_of(i for each in ours for i in each))
    naive, limits = success.naive, success.by_prompt
    rate = Rate(k=naive.k, n=naive.n, rate=naive.rate, low=limits.low, high=limits.high)
    refused, base = ([refusals(run, row) for run in setting.runs] for row in (name, "base"))
    drift = pooled_difference(refused, base, setting.group_of(i for each in refused for i in each))
    paired = drift.naive.model_copy(update={"low": drift.by_prompt.low, "high": drift.by_prompt.high})
    row = like.row.model_copy(
        update={
            "name": name,
            "harmful_drift": drift.naive.difference,
            "against_base": {HARMFUL: paired} if name != "base" else {},
        }
    )
    return like.model_copy(update={"edit_success": rate, "row": row, "chosen_by": rules})


def labels(run: Run, name: str, bucket: str) -> dict[str, Label]:
    """The base's where this run deploys nothing under that name."""
    return run.verdicts(name if run.row(name) is not None else "base")[bucket]


def refusals(run: Run, name: str) -> dict[str, bool]:
    return {i: x == Label.HARMLESS_REFUSAL for i, x in labels(run, name, HARMFUL).items()}
