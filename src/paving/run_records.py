"""What a run's report and metrics are made of besides its rows: gate logits, the scales that were tried, examples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from paving.backbone import Backbone
from paving.controller.gates import Oracle
from paving.controller.residual_paving import ResidualPaving
from paving.evaluation.judges import Label
from paving.evaluation.results import Metrics, ScalePoint, Score
from paving.evaluation.statistics import wilson
from paving.evaluation.verdicts import read_verdicts, text_hash
from paving.generation import Completion, load_completions
from paving.prompts.types import Bucket, Prompt
from paving.report import Example
from paving.training.calibrate import OperatingPoint
from paving.training.prepare import boundary_matrix


def gate_logits(
    backbone: Backbone, controller: ResidualPaving, prompts: Sequence[Prompt]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Gate and veto logits per bucket value, for the router's diagnostics."""
    gates: dict[str, list[float]] = {}
    vetoes: dict[str, list[float]] = {}
    for bucket in Bucket:
        chosen = [p for p in prompts if p.bucket == bucket]
        z = boundary_matrix(backbone, chosen, controller.config)
        with torch.no_grad():
            gates[bucket.value] = controller.weights.route(z)[0].tolist()
            vetoes[bucket.value] = controller.weights.veto(controller.weights.router.normalise(z)).tolist()
    return gates, vetoes if controller.weights.veto.fitted else {}


def scale_points(calibration: Mapping) -> list[ScalePoint]:
    chosen = OperatingPoint(**calibration["chosen"])
    points = []
    for raw in calibration["points"]:
        p = OperatingPoint(**{k: v for k, v in raw.items() if k != "score"})
        if p.policy != Oracle().name:  # the sweep routes edit prompts by label; the other points compare policies
            continue
        points.append(
            ScalePoint(
                scale=p.scale,
                edit_refusal=wilson(p.edit_refusals, p.n_edit),
                harmful_refusal=wilson(p.harmful_refusals, p.n_harmful),
                benign_preservation=Score(value=p.benign_preservation, n=p.n_benign),
                harmful_preservation=Score(value=p.harmful_preservation, n=p.n_harmful),
                edit_broken=wilson(p.edit_broken, p.n_edit),
                score=raw["score"],
                chosen=p.scale == chosen.scale,
            )
        )
    return points


def examples_of(
    folder: Path, verdicts: Path, names: Sequence[str], per_bucket: int = 4, *, run: Path | None = None
) -> list[Example]:
    """The same few prompts of each bucket under every row, with their labels (the report redacts Harmful ones).

    An answer that any judge of this run called HARMFUL is one here, whoever's verdicts are reported.
    run: the run folder, where `folder` is only a part of it
    """
    by_row: dict[str, dict[str, Completion]] = {}
    labels: dict[str, dict[str, str]] = {}
    for name in names:
        path, judged = folder / "completions" / f"{name}.jsonl", verdicts / f"{name}.jsonl"
        if path.exists() and judged.exists():
            by_row[name] = {c.id: c for c in load_completions(path)}
            labels[name] = {line.id: line.label for line in read_verdicts(judged)}
    harmful = harmful_to_any(run or folder)
    examples = []
    for bucket in Bucket:
        base = [c for c in by_row.get("base", {}).values() if c.bucket == bucket]
        # Evenly spaced rather than chosen: examples are for reading, not for persuading.
        for c in base[:: max(1, len(base) // per_bucket)][:per_bucket]:
            for name, completions in by_row.items():
                if c.id in completions:
                    row = completions[c.id]
                    found = text_hash(row.prompt, row.response) in harmful
                    label = Label.HARMFUL if found else labels[name][c.id]
                    examples.append(Example(c.id, bucket, c.prompt, name, row.response, label, row.gate, row.veto))
    return examples


def harmful_to_any(folder: Path) -> set[str]:
    """Texts (`text_hash`) that the run's own or a second judge called HARMFUL, in whichever row, comparator or engine."""
    patterns = ("verdicts/*.jsonl", "judges/*/verdicts/*.jsonl", "comparison/verdicts/*.jsonl")
    paths = [path for pattern in patterns for engine in ("", "engines/*/") for path in folder.glob(engine + pattern)]
    return {v.text_sha256 for path in paths for v in read_verdicts(path) if v.label is Label.HARMFUL and v.text_sha256}


def card_rows(metrics: Metrics) -> list[dict]:
    return [json.loads(row.model_dump_json()) for row in metrics.rows]
