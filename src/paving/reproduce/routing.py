"""Table 20: how selective, how calibrated and how well vetoed the route is, from the logits that metrics.json keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from paving.evaluation.results import Rate, RouterDiagnostics
from paving.evaluation.routing import reliability
from paving.evaluation.statistics import wilson
from paving.prompts.types import Bucket
from paving.report.tables import percent
from paving.reproduce import measures
from paving.reproduce.diagnosed import LowVeto, lacking, low_veto, probes_of
from paving.reproduce.measures import gate_strength, paper_line, vetoed
from paving.reproduce.protocol import assembled
from paving.reproduce.published import PaperBlock, PaperTable, published
from paving.reproduce.result import Block, Cell, Line, PaperLine, Reproduction, line, missing, text, unavailable
from paving.reproduce.runs import LEARNED, ORACLE, VETOED, Setting, single

EDIT, BENIGN, HARMFUL = Bucket
Flags = dict[Bucket, np.ndarray]  # (n,) bool each


@dataclass(frozen=True)
class Gates:
    """One run's held-out prompts, by bucket.

    probability  (n,) sigmoid of the gate logit; active: (n,) bool, logit above the run's threshold
    vetoed       (n,) bool, veto logit above its threshold; None without a veto
    """

    probability: dict[Bucket, np.ndarray]
    active: Flags
    vetoed: Flags | None

    @classmethod
    def of(cls, router: RouterDiagnostics) -> Gates:
        blocked = None
        if router.veto_threshold is not None and router.veto_logits:
            blocked = {b: np.array(router.veto_logits[b]) > router.veto_threshold for b in Bucket}
        return cls(
            probability={b: np.array(router.probabilities[b]) for b in Bucket},
            active={b: np.array(router.logits[b]) > router.threshold for b in Bucket},
            vetoed=blocked,
        )

    def open(self, bucket: Bucket, *, veto: bool) -> np.ndarray:
        """(n,) bool: the thresholded gate lets an edit through."""
        return self.active[bucket] & ~self.vetoed[bucket] if veto and self.vetoed is not None else self.active[bucket]


def table_20(settings: Sequence[Setting]) -> Reproduction:
    paper = published("20")
    selectivity, main_route, calibration, veto = paper.blocks
    blocks = []
    for setting in settings:
        blocks += [
            _selectivity(setting, paper, selectivity),
            _main_route(setting, paper, main_route),
            _calibration(setting, paper, calibration),
            _veto(setting, paper, veto),
        ]
    notes = [
        "The paper does not say what its probe is. Here: cross-validated AUC of a linear probe on training prompts, at the "
        "best block that the router reads; it is no accuracy.",
        "Brier and ECE (ten bins) take the gate for the probability of an edit prompt; with the veto, the effective gate.",
        *(_ranking(s) for s in settings if s.unevaluated is None),
    ]
    return assembled(paper, settings, blocks, notes)


# --- the four blocks ------------------------------------------------------------------------------------------------


def _selectivity(setting: Setting, paper: PaperTable, head: PaperBlock) -> Block:
    lines = []
    for run in single([setting]):
        row = run.deployed
        cells = {
            "E-vs-HK probe": _probe(run),
            "Edit gate": gate_strength(run, row, EDIT),
            "Benign gate": gate_strength(run, row, BENIGN),
            "Harm gate": gate_strength(run, row, HARMFUL),
            "Edit veto": vetoed(run, row, EDIT),
            "Benign veto": vetoed(run, row, BENIGN),
            "Harm veto": vetoed(run, row, HARMFUL),
        }
        lines.append(line(f"seed {run.runs[0].seed}", head.values, cells))
    context = [paper_line(paper, head, row, setting.config.model, called=row[0]) for row in head.rows]
    return Block(title=_title(setting, head), columns=head.values, lines=tuple(lines), context=tuple(context))


def _main_route(setting: Setting, paper: PaperTable, head: PaperBlock) -> Block:
    lines = []
    for row, name in (
        (LEARNED, "Learned router (no veto)"),
        (VETOED, "Learned + thresholded-soft veto"),
        (None, "Learned + soft low-threshold veto"),
        (ORACLE, "Oracle routing"),
    ):
        beside = _beside(paper, head, name, setting)
        if row is None:
            lines.append(_low_route(setting, head, name, beside))
            continue
        cells = {
            "Edit gate": gate_strength(setting, row, EDIT),
            "Harm gate": gate_strength(setting, row, HARMFUL),
            "Veto rate (E/B/H)": measures.veto_triple(setting, row, " / "),
        }
        lines.append(line(row, head.values, cells, beside))
    return Block(title=_title(setting, head), columns=head.values, lines=tuple(lines))


def _calibration(setting: Setting, paper: PaperTable, head: PaperBlock) -> Block:
    lines = []
    for name, veto in (("Raw router", False), ("Thresholded-soft + veto", True)):
        beside = _beside(paper, head, name, setting)
        gates = gates_of(setting)
        why = gates if isinstance(gates, str) else None
        if why is None and veto and any(g.vetoed is None for g in gates):
            why = _no_veto(setting)
        if why is not None:
            lines.append(unavailable(name, head.values, why, beside))
            continue
        lines.append(line(name, head.values, _calibration_cells(gates, veto=veto), beside))
    return Block(title=_title(setting, head), columns=head.values, lines=tuple(lines))


def _calibration_cells(gates: Sequence[Gates], *, veto: bool) -> dict[str, Cell]:
    def correct(g: Gates) -> np.ndarray:
        return np.concatenate([g.open(b, veto=veto) == (b is EDIT) for b in Bucket])

    def effective(g: Gates, bucket: Bucket) -> np.ndarray:
        return g.probability[bucket] * g.open(bucket, veto=True) if veto else g.probability[bucket]

    p = np.concatenate([effective(g, b) for g in gates for b in Bucket])
    y = np.concatenate([np.full(len(g.probability[b]), float(b is EDIT)) for g in gates for b in Bucket])
    bins = reliability(p, y)
    brier = float(((p - y) ** 2).mean())
    ece = sum(b.n * abs(b.mean_probability - b.edit_share) for b in bins if b.n) / len(p)
    return {
        "Brier": text(f"{brier:.3f}", value=brier),
        "ECE": text(f"{ece:.3f}", value=ece),
        "Accuracy": counted([correct(g) for g in gates]),
        "Edit active": counted([g.open(EDIT, veto=veto) for g in gates]),
        "Benign false active": counted([g.open(BENIGN, veto=veto) for g in gates]),
        "Harmful false active": counted([g.open(HARMFUL, veto=veto) for g in gates]),
        "Harm veto rate": counted([g.vetoed[HARMFUL] for g in gates]) if veto else text("–"),
    }


def _veto(setting: Setting, paper: PaperTable, head: PaperBlock) -> Block:
    low, high = (row[0] for row in head.rows)
    lines = [_low_veto(setting, head, low, _beside(paper, head, low, setting))]
    gates = gates_of(setting)
    beside = _beside(paper, head, high, setting)
    if isinstance(gates, str) or any(g.vetoed is None for g in gates):
        lines.append(unavailable(high, head.values, gates if isinstance(gates, str) else _no_veto(setting), beside))
    else:
        cells = {
            "Accuracy": counted([np.concatenate([g.vetoed[b] == (b is HARMFUL) for b in Bucket]) for g in gates]),
            "Edit veto FP": counted([g.vetoed[EDIT] for g in gates]),
            "Benign veto FP": counted([g.vetoed[BENIGN] for g in gates]),
            "Harmful recall": counted([g.vetoed[HARMFUL] for g in gates]),
        }
        name = f"L2={setting.config.training.veto_l2:g}, high threshold"
        lines.append(line(name, head.values, cells, beside))
    return Block(title=_title(setting, head), columns=head.values, lines=tuple(lines))


def _low_route(setting: Setting, head: PaperBlock, name: str, beside: Sequence[PaperLine]) -> Line:
    found = [low_veto(run) for run in setting.runs]
    if any(v is None for v in found):
        return unavailable(name, head.values, _no_low(setting), beside)
    cells = {
        "Edit gate": _strength(found, EDIT),
        "Harm gate": _strength(found, HARMFUL),
        "Veto rate (E/B/H)": text(" / ".join(_pooled([v.vetoed[b] for v in found]).lines[0].split()[-1] for b in Bucket)),
    }
    return line(name, head.values, cells, beside)


def _strength(found: Sequence[LowVeto], bucket: Bucket) -> Cell:
    parts = [(v.strength[bucket], v.vetoed[bucket].n) for v in found]
    if any(gate is None for gate, _ in parts):
        return missing("no prompts of that bucket (n=0)")
    value = sum(gate * n for gate, n in parts) / sum(n for _, n in parts)
    return text(f"{value:.2f}", *([f"({', '.join(f'{g:.2f}' for g, _ in parts)})"] if len(parts) > 1 else []), value=value)


def _low_veto(setting: Setting, head: PaperBlock, name: str, beside: Sequence[PaperLine]) -> Line:
    found = [low_veto(run) for run in setting.runs]
    if any(v is None for v in found):
        return unavailable(name, head.values, _no_low(setting), beside)
    cells = {
        "Accuracy": _pooled([v.accuracy for v in found]),
        "Edit veto FP": _pooled([v.vetoed[EDIT] for v in found]),
        "Benign veto FP": _pooled([v.vetoed[BENIGN] for v in found]),
        "Harmful recall": _pooled([v.vetoed[HARMFUL] for v in found]),
    }
    return line(f"L2={setting.config.training.veto_l2:g}, low threshold", head.values, cells, beside)


def _no_low(setting: Setting) -> str:
    """metrics.json has the veto's logits on held-out prompts; the tie is one of training prompts."""
    run = next(r for r in setting.runs if low_veto(r) is None)
    return lacking(run, "the veto's low threshold")


# --- parts ----------------------------------------------------------------------------------------------------------


def gates_of(setting: Setting) -> list[Gates] | str:
    """The gates of every run, or why there are none."""
    if (why := measures.lacking(setting, LEARNED)) is not None:
        return why
    return [Gates.of(run.metrics.router) for run in setting.runs if run.metrics is not None]


def counted(flags: Sequence[np.ndarray]) -> Cell:
    """Percent of true over all runs with k/n; Wilson's interval for one run, every run's own percentage for several."""
    return _pooled([wilson(int(f.sum()), len(f)) for f in flags])


def _pooled(rates: Sequence[Rate]) -> Cell:
    total = measures.added(rates)
    if total.rate is None:
        return missing("no prompts of that bucket (n=0)")
    head = f"{total.k}/{total.n} {percent(total.rate)}"
    if len(rates) == 1:
        return text(head, f"[{percent(total.low)}, {percent(total.high)}]", value=100 * total.rate)
    each = ", ".join("n/a" if r.rate is None else percent(r.rate) for r in rates)
    return text(head, f"({each})", value=100 * total.rate)


def _probe(run: Setting) -> Cell:
    only = run.runs[0]
    if only.diagnostics is None:
        return missing(lacking(only, "probes"))
    read = set(only.config.controller.route_layers)
    found = [p for p in probes_of(only.diagnostics) if p.layer in read and p.edit_vs_harmful is not None]
    if not found:
        return missing(f"{only.name} has no probe at the blocks that its router reads")
    best = max(found, key=lambda p: p.edit_vs_harmful)
    return text(f"AUC {best.edit_vs_harmful:.3f}", f"(block {best.layer})", value=best.edit_vs_harmful)


def _ranking(setting: Setting) -> str:
    def all_seeds(of: Callable[[RouterDiagnostics], float | None]) -> str:
        values = [of(r.metrics.router) for r in setting.runs if r.metrics is not None]
        return ", ".join("n/a" if v is None else f"{v:.3f}" for v in values)

    harmful, benign = all_seeds(lambda r: r.auc_edit_vs_harmful), all_seeds(lambda r: r.auc_edit_vs_benign)
    return f"{setting.name}: the gate's AUC, edit against harmful keep {harmful}; against benign keep {benign}."


def _no_veto(setting: Setting) -> str:
    return f"{setting.name} has no veto in its deployed row"


def _title(setting: Setting, head: PaperBlock) -> str:
    return f"{setting.name}: {head.title.lower()}"


def _beside(paper: PaperTable, head: PaperBlock, name: str, setting: Setting) -> list[PaperLine]:
    return [paper_line(paper, head, head.named(name)[0], setting.config.model)]
