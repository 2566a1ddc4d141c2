"""Run folders as `paving train` and `paving eval` leave them, of answers that nobody gave: made up, measured on no model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from paving.evaluation.diagnostics.records import Diagnostics
from paving.evaluation.judges import Label
from paving.evaluation.results import Metrics, OracleGaps, Row, Score
from paving.evaluation.routing import router_diagnostics
from paving.evaluation.statistics import control_score, wilson
from paving.prompts.types import Bucket
from paving.run_folder import RunConfig

EDIT, BENIGN, HARMFUL = Bucket
N_LAYERS = 30
REFUSAL, REFRAME, ANSWER, HELPED = (
    Label.HARMLESS_REFUSAL,
    Label.HARMLESS_REFRAME,
    Label.HARMLESS_BENIGN,
    Label.HARMFUL,
)


@dataclass(frozen=True)
class Plan:
    """One row: how many of each bucket are refused, how many of the rest are called HARMFUL, and what the veto blocked."""

    name: str
    kind: str = "learned"
    policy: str = "thresholded"
    scale: float | None = 2.0
    refused: tuple[int, int, int] = (4, 1, 20)
    harmful: tuple[int, int, int] = (0, 0, 0)
    preservation: tuple[float, float] = (0.99, 0.95)
    gate: tuple[float, float, float] = (0.9, 0.02, 0.1)
    vetoed: tuple[int, int, int] | None = None


BASE = Plan("base", "reference", "none", None, (40, 1, 24), (0, 0, 0), (1.0, 1.0), (0.0, 0.0, 0.0))
LEARNED = Plan("learned", refused=(4, 1, 18), harmful=(1, 0, 3), preservation=(0.98, 0.90))
VETOED = Plan("learned+veto", refused=(5, 1, 22), preservation=(0.98, 0.95), gate=(0.85, 0.02, 0.05), vetoed=(2, 0, 25))
ORACLE = Plan("oracle", "diagnostic", "oracle", refused=(0, 1, 24), preservation=(1.0, 1.0), gate=(1.0, 0.0, 0.0))
ROWS = (BASE, LEARNED, VETOED, ORACLE)
SIZES = (40, 20, 30)
# Gate logits by bucket: 37 of 40 edit prompts, 1 of 20 benign and 3 of 30 harmful keeps above 0.5; the veto blocks 2, 0, 25.
LOGITS = {EDIT: [3.0] * 37 + [-1.0] * 3, BENIGN: [2.0] + [-6.0] * 19, HARMFUL: [1.0] * 3 + [-3.0] * 27}
VETO_LOGITS = {EDIT: [1.5] * 2 + [-4.0] * 38, BENIGN: [-8.0] * 20, HARMFUL: [-1.0] * 2 + [2.0] * 25 + [-1.0] * 3}


def write_run(
    folder: Path,
    config: RunConfig | None = None,
    *,
    rows: tuple[Plan, ...] = ROWS,
    seed: int = 0,
    sizes: tuple[int, int, int] = SIZES,
    judge: str = "rules-1",
    evaluated: bool = True,
    diagnosed: bool = False,
    verdicts: bool = True,
) -> Path:
    """The folder, with what the commands given so far would have written into it."""
    config = with_seed(config or RunConfig(), seed)
    write(folder / "config.json", config.model_dump_json(indent=1))
    edit = config.controller.edit_layers or tuple(range(max(config.controller.route_layers) + 1, N_LAYERS))
    described = {"base": {"n_layers": N_LAYERS}, "config": {"edit_layers": edit}}
    write(folder / "controller" / "controller.json", json.dumps(described))
    if evaluated:
        labels = {plan.name: answers(plan, sizes, seed) for plan in rows}
        write(folder / "metrics.json", metrics(folder.name, config, rows, sizes, labels, judge).model_dump_json())
        for row, by_bucket in labels.items() if verdicts else ():
            lines = [
                json.dumps({"id": i, "bucket": bucket, "judge": judge, "label": label, "refusal": label == REFUSAL})
                for bucket, found in by_bucket.items()
                for i, label in found.items()
            ]
            write(folder / "verdicts" / f"{row}.jsonl", "\n".join(lines) + "\n")
    if diagnosed:
        write(folder / "diagnostics.json", diagnostics(folder.name, edit).model_dump_json())
    return folder


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    training = config.training.model_copy(update={"seed": seed})
    return config.model_copy(update={"split_seed": seed, "training": training})


def changed(config: RunConfig, **fields) -> RunConfig:
    """changed(config, training__horizon=6): the same configuration with fields of its parts replaced."""
    values = config.model_dump(mode="json")
    for path, value in fields.items():
        *parts, last = path.split("__")
        place = values
        for part in parts:
            place = place[part]
        place[last] = value
    return RunConfig.model_validate(values)


def answers(plan: Plan, sizes: tuple[int, int, int], seed: int) -> dict[str, dict[str, Label]]:
    """bucket -> prompt id -> label. Held-out splits of neighbouring seeds share half their prompts."""
    found = {}
    for bucket, n, refused, harmful in zip(Bucket, sizes, plan.refused, plan.harmful, strict=True):
        first = seed * (n // 2)
        rest = HELPED if bucket is HARMFUL else ANSWER
        labels = [REFUSAL] * refused + [HELPED] * harmful
        labels += [rest if bucket is not EDIT else REFRAME] * (n - len(labels))
        found[bucket.value] = {f"{bucket.value}-{first + i}": label for i, label in enumerate(labels)}
    return found


def metrics(name, config: RunConfig, plans, sizes, labels, judge: str) -> Metrics:
    counts = {b.value: n for b, n in zip(Bucket, sizes, strict=True)}
    rows: list[Row] = []
    for plan in plans:
        refusal = {b: wilson(sum(x == REFUSAL for x in f.values()), len(f)) for b, f in labels[plan.name].items()}
        base = rows[0].refusal[HARMFUL] if rows else refusal[HARMFUL]
        kept = {b: Score(value=v, n=counts[b]) for b, v in zip((BENIGN, HARMFUL), plan.preservation, strict=True)}
        vetoed = plan.vetoed or (0, 0, 0)
        rows.append(
            Row(
                name=plan.name,
                kind=plan.kind,
                policy=plan.policy,
                scale=plan.scale,
                refusal=refusal,
                labels={b: {x.value: list(f.values()).count(x) for x in Label} for b, f in labels[plan.name].items()},
                preservation=kept,
                harmful_drift=None if not base.n else refusal[HARMFUL].rate - base.rate,
                gate_active={b: wilson(round(g * n), n) for b, g, n in zip(Bucket, plan.gate, sizes, strict=True)},
                gate_mean=dict(zip(Bucket, plan.gate, strict=True)),
                veto_rate={b: wilson(k, n if plan.vetoed else 0) for b, k, n in zip(Bucket, vetoed, sizes, strict=True)},
                control_score=control_score(refusal[EDIT], kept[BENIGN], refusal[HARMFUL], base),
            )
        )
    has_veto = any(plan.vetoed for plan in plans)
    veto_logits = {b.value: VETO_LOGITS[b] for b in Bucket} if has_veto else {}
    return Metrics(
        run=name,
        model=config.model,
        seed=config.training.seed,
        judge=judge,
        decoding=config.decoding.model_dump(),
        buckets={"train": {b: 3 * n for b, n in counts.items()}, "calibration": counts, "held_out": counts},
        filters=[],
        rows=rows,
        oracle_gaps=OracleGaps(route_benign=None, route_harmful=None, edit=None),
        thresholds=[],
        scales=[],
        router=router_diagnostics({b.value: LOGITS[b] for b in Bucket}, veto_logits, 0.5, 0.25 if has_veto else None),
        training=[],
    )


def diagnostics(name: str, layers: tuple[int, ...]) -> Diagnostics:
    """The parts of a diagnosis that the tables read."""
    rms = {EDIT: (3.21, 40), BENIGN: (0.01, 20), HARMFUL: (None, 0)}
    trajectory = {
        "policy": "thresholded",
        "n_closed": 3,
        "edit": {"mean": 0.475, "sd": 0.118, "n": 37},
        "refusal": {"mean": 0.219, "sd": 0.057, "n": 37},
        "gap": {"mean": 0.256, "sd": 0.1, "n": 37},
        "layers": [{"layer": i, "edit": 0.5, "refusal": 0.2} for i in layers],
        "steps": [],
        "nll_base": {"mean": 3.0, "sd": 1.0, "n": 37},
        "nll_edited": {"mean": 1.0, "sd": 0.5, "n": 37},
        "nll_reduction": 0.731,
    }
    probes = [{"layer": i, "edit_vs_harmful": 0.5 + i / 100, "edit_vs_benign": 0.99} for i in range(N_LAYERS)]
    trajectory["n_short"] = 0
    trajectory["paths"] = {
        b: {
            "active": wilson(0, n),
            "blocked": None,
            "path_rms": {"mean": v, "sd": v, "n": n},
            "nll_delta": {"mean": None if v is None else 0.047, "sd": None, "n": n},
        }
        for b, (v, n) in rms.items()
    }
    vetoed = {EDIT: wilson(6, 40), BENIGN: wilson(0, 20), HARMFUL: wilson(28, 30)}
    low = {"name": "low threshold", "threshold": -1.0, "accuracy": wilson(82, 90), "vetoed": vetoed}
    view = {"name": "thresholded + veto, low", "brier": 0.1, "ece": 0.1, "accuracy": wilson(80, 90), "active": vetoed}
    view |= {"strength": {EDIT: 1.5, BENIGN: 0.0, HARMFUL: 0.1}, "vetoed": vetoed}
    route = {"routes": [view], "vetoes": [low], "curve": []}
    content = {"trajectory": trajectory, "probes": {"layers": probes, "prompts": {b: 60 for b in Bucket}}, "route": route}
    content |= {"keys": {}, "seconds": {}, "skipped": {}}
    return Diagnostics.model_validate({"run": name, "judge": "rules-1", **content})


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


GEMMA = RunConfig(model="google/gemma-3-4b-it", controller={"edit_layers": tuple(range(5, 34))})
OTHER = RunConfig(model="/models/organism")


def lines(found, block: int = 0) -> dict:
    return {line.name: line for line in found.blocks[block].lines}


def cell(found, name: str, heading: str, block: int = 0):
    return lines(found, block)[name].cells[heading]
