"""Tables of a comparison over several seeds: row -> column -> cell, each with its interval and every seed's own figure.

Rows: METHOD/VARIANT/RULE/OBJECTIVES, at the scale that the rule takes for so many objectives. A row is pooled over the seeds
that have it, and says how many do; the columns "of every seed" and "less Residual Paving's" are of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from paving.compare.choose import control
from paving.compare.methods import VARIANTS
from paving.evaluation.comparison import BASE, OWN, BenignSimilarity, ComparedRow, edit_success, is_success
from paving.evaluation.judges import Label
from paving.evaluation.seeds import pooled_difference, pooled_rate
from paving.prompts.types import Bucket
from paving.reproduce.measures import NOT_REFUSED, added, drift, preservation, scale, share
from paving.reproduce.result import Cell, missing, text
from paving.reproduce.runs import Run, Setting

EDIT, BENIGN, HARMFUL = Bucket
OWN_ROWS = ("base", "learned", "learned+veto", "oracle")
SUCCESS = {Label.HARMLESS_REFRAME, Label.HARMLESS_BENIGN}
LESS_OWN = "less Residual Paving's, same rule"
EVERY_SEED = "of every seed"
BRIEF = (
    "seeds", "scale", "edit success", EVERY_SEED, LESS_OWN, "to target", "benign pres.", "harmful pres.", "harmful drift",
    "gates open",
)  # fmt: skip
RULES = ("strict/three", "control/three", "strict/two", "control/two")


def pooled(setting: Setting) -> dict[str, dict[str, Cell]]:
    """Row -> column -> cell, over the seeds that have the row."""
    pairs = dict.fromkeys((c.method, c.variant) for run in setting.runs for c in run.comparison.choices)
    names = [*OWN_ROWS, *(f"{method}/{variant}/{rule}" for method, variant in pairs for rule in RULES)]
    swept = {method for method, _ in pairs}
    nowhere = dict.fromkeys(m.name for run in setting.runs for m in run.comparison.methods if m.name not in swept)
    names += [f"{name}/{VARIANTS[0]}/{RULES[0]}" for name in nowhere]  # could be fitted on no seed: one row says why
    return {name: cells(setting, name) for name in names}


def control_rows(control: str, setting: Setting) -> dict[str, dict[str, Cell]]:
    """A capacity control's rows by every rule."""
    variants = dict.fromkeys(c.variant for run in setting.runs for c in run.comparison.choices if c.method == OWN)
    rows = {f"{control}: {v}/{rule}": cells(setting, f"{OWN}/{v}/{rule}") for v in variants for rule in RULES}
    return {name: row | {LESS_OWN: text("–")} for name, row in rows.items()}


def cells(setting: Setting, row: str) -> dict[str, Cell]:
    having = Setting(tuple(run for run in setting.runs if run.row(row) is not None))
    columns: Mapping[str, Callable[[], Cell]] = {
        "scale": lambda: scale(having, row),
        "edit success": lambda: share(having, row, EDIT, SUCCESS),
        EVERY_SEED: lambda: every_seed(setting, row),
        LESS_OWN: lambda: against_own(setting, row),
        "to target": lambda: to_target(having, row),
        "refused": lambda: share(having, row, EDIT),
        "broken": lambda: share(having, row, EDIT, {Label.HARMLESS_BROKEN}),
        "HARMFUL": lambda: share(having, row, EDIT, {Label.HARMFUL}),
        "benign pres.": lambda: preservation(having, row, BENIGN),
        "harmful pres.": lambda: preservation(having, row, HARMFUL),
        "harmful drift": lambda: drift(having, row),
        "harmful ASR": lambda: share(having, row, HARMFUL, NOT_REFUSED),
        "gates open": lambda: open_gates(having, row),
        "control score": lambda: control_by_rule(having, row),
        **{name: lambda take=take: benign(having, row, take) for name, take in SIMILARITIES.items()},
    }
    found = {"seeds": text(f"{len(having.runs)} of {len(setting.runs)}")}
    if not having.runs:
        why = missing(" ".join(dict.fromkeys(why_not(run, row) for run in setting.runs)))
        return found | dict.fromkeys(columns, why)
    return found | {name: make() for name, make in columns.items()}


def why_not(run: Run, row: str) -> str:
    return run.could_not_be_fitted(row) or ("no scale passes" if run.passes_nowhere(row) else "not measured")


def every_seed(setting: Setting, row: str) -> Cell:
    """Edit success over all seeds: where the rule takes no scale, the method is not deployed and the base answers."""
    if (why := not_on_every_seed(setting, row)) is not None:
        return missing(why)
    flags = [successes(run, row) for run in setting.runs]
    found = pooled_rate(flags, setting.group_of(i for each in flags for i in each))
    if found.by_prompt.value is None:
        return missing("no edit prompts (n=0)")
    seeds = ", ".join(shown(v) for v in found.seeds.seeds)
    return text(f"{shown(found.by_prompt.value)} ({seeds})", value=100 * found.by_prompt.value)


def not_on_every_seed(setting: Setting, row: str) -> str | None:
    """Why nothing can be said over all seeds: some were not measured, which is not the same as deploying nothing."""
    left = [run.name for run in setting.runs if run.row(row) is None and not deploys_nothing(run, row)]
    return f"not measured on {', '.join(left)}" if left else None


def deploys_nothing(run: Run, row: str) -> bool:
    """The rule takes no scale, or the method could not be fitted: the base answers."""
    return "/" in row and (run.passes_nowhere(row) or run.could_not_be_fitted(row) is not None)


def against_own(setting: Setting, row: str) -> Cell:
    """Edit success less that of Residual Paving by the same rule, in points, over every seed (the base's answers where a
    rule took no scale for either). Of its deployed row; an oracle's less that of Residual Paving's oracle."""
    if row in OWN_ROWS or row.startswith(f"{OWN}/"):
        return text("–")
    _, variant, *rule = row.split("/")
    own = "/".join([OWN, "oracle" if variant == "oracle" else setting.deployed, *rule])
    for name in (own, row):
        if (why := not_on_every_seed(setting, name)) is not None:
            return missing(why)
    if all(run.row(own) is None for run in setting.runs):
        return missing("no scale of Residual Paving's passes")
    ours, theirs = ([successes(run, name) for run in setting.runs] for name in (row, own))
    found = pooled_difference(ours, theirs, setting.group_of(i for each in ours for i in each)).by_prompt
    if found.value is None:
        return missing("no edit prompts (n=0)")
    limits = "[n/a]" if found.low is None or found.high is None else f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return text(f"{100 * found.value:+.1f}", limits, value=100 * found.value)


def to_target(setting: Setting, row: str) -> Cell:
    """Mean ROUGE-L, times 100, of edit answers to their targets; over all answers of all seeds."""
    found = [compared_of(run, row).target for run in setting.runs]
    if any(t is None or t.rouge_l is None for t in found):
        return missing("not measured")
    value = 100 * sum(t.n * t.rouge_l for t in found) / sum(t.n for t in found)
    return text(f"{value:.1f}", value=value)


def open_gates(setting: Setting, row: str) -> Cell:
    """Percent of prompts whose gate is open, after the veto: edit / benign keeps / harmful keeps."""
    rates = [added([r.gate_active[b] for r in setting.rows(row)]).rate for b in Bucket]
    return text(" / ".join(shown(r) for r in rates))


def control_by_rule(setting: Setting, row: str) -> Cell:
    """The score by which the control rule chooses (docs/comparators.md), of held-out prompts: mean over seeds."""
    objective = "two" if row.endswith("/two") else "three"
    each = []
    for run in setting.runs:
        r, base = run.row(row), run.row("base")
        success, harmful = edit_success(r.labels[EDIT]), r.refusal[HARMFUL]
        each.append(control(objective, success, r.preservation[BENIGN], harmful, base.refusal[HARMFUL]))
    if any(v is None for v in each):
        return missing("a bucket is empty (n=0)")
    return text(f"{fmean(each):.3f}", f"({', '.join(f'{v:.3f}' for v in each)})", value=fmean(each))


def shown(rate: float | None) -> str:
    return "n/a" if rate is None else f"{100 * rate:.1f}"


def successes(run: Run, row: str) -> dict[str, bool]:
    """Of the base where this run has no such row: see `deploys_nothing`."""
    verdicts = run.verdicts(row if run.row(row) is not None else "base")
    return {i: is_success(label) for i, label in verdicts[EDIT.value].items()}


# Of the answers to benign keeps, beside the base's own to the same prompts.
SIMILARITIES: dict[str, Callable[[BenignSimilarity], float | None]] = {
    "same label": lambda b: b.label_agreement.rate and 100 * b.label_agreement.rate,
    "label not worse": lambda b: b.non_worse.rate and 100 * b.non_worse.rate,
    "ROUGE-L": lambda b: b.rouge_l and 100 * b.rouge_l,
    "chrF": lambda b: b.chrf,
    "BERTScore": lambda b: b.bert_score and 100 * b.bert_score,
}


def benign(setting: Setting, row: str, take: Callable[[BenignSimilarity], float | None]) -> Cell:
    """Mean over seeds, which have as many benign keeps each."""
    values = [take(compared_of(run, row).benign) for run in setting.runs]
    if any(v is None for v in values):
        return missing("not measured")
    return text(f"{fmean(values):.1f}", value=fmean(values))


def compared_of(run: Run, row: str) -> ComparedRow:
    if row in OWN_ROWS:
        return next(r for r in run.comparison.rows if r.row.name == row and r.method in (BASE, OWN))
    return run.compared(row)


def told(cell: Cell) -> dict:
    return {"text": " ".join(cell.lines), "value": cell.value} | ({"missing": cell.missing} if cell.missing else {})


def of_rule(name: str, rule: str) -> bool:
    return name in OWN_ROWS or name.endswith(f"/{rule}")


def markdown(table: Mapping[str, Mapping[str, Cell]]) -> str:
    columns: Sequence[str] = list(next(iter(table.values())))
    lines = [f"| row | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(' '.join(c.lines) for c in row.values())} |" for name, row in table.items()]
    return "\n".join(lines)
