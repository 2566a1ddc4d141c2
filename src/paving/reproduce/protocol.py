"""How a run's protocol differs from the paper's: both are compared field by field, and nothing is taken for granted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paving.evaluation.results import Metrics
from paving.presets import preset_for
from paving.prompts.types import Bucket, SplitName
from paving.reproduce.published import BACKBONES, PaperTable, number, paper_name, published
from paving.reproduce.result import Block, Reproduction
from paving.reproduce.runs import Run, Setting
from paving.reproduce.variants import leaves, short_name

# What the paper calls its prompt sources (section 4), and the dataset ids under which `paving` reads them.
SOURCES = {
    "edit": ("SALAD-Bench", "OpenSafetyLab/Salad-Data"),
    "benign": ("Alpaca", "tatsu-lab/alpaca"),
    "harmful": ("HarmBench", "walledai/HarmBench"),
}


@dataclass(frozen=True)
class Field:
    """One setting that the paper gives (table 5): its name in config.json, the paper's value, and what to call it."""

    leaf: str
    value: Any
    words: str


# Component of table 5 -> the settings that make it up here. Components that are no settings have none.
COMPONENTS: dict[str, tuple[Field, ...]] = {
    "Backbone": (),
    "Route layers": (Field("controller.route_layers", [1, 2, 3, 4], "route layers"),),
    "Intervention layers": (),  # by backbone, see `expected_layers`
    "Experts K": (Field("controller.n_experts", 3, "experts"),),
    "Expert maps": (Field("controller.bottleneck_ratio", 8, "width / bottleneck"),),  # 2560 / 320
    "Expert layer windows": (
        Field("controller.centres", [0.30, 0.55, 0.80], "window centres"),
        Field("controller.widths", [0.15, 0.20, 0.15], "window widths"),
    ),
    "Router head": (Field("controller.router_hidden", 64, "router hidden width"),),
    "Evaluation scale s": (Field("calibration.scales", [1.0, 2.0, 4.0, 8.0, 16.0], "scales searched"),),
    "Gate policy": (),
    "Gate threshold τ": (),
    "Auxiliary veto": (
        Field("calibration.use_veto", True, "veto"),
        Field("training.veto_l2", 0.1, "veto L2"),
    ),
    "Veto threshold τ_v": (),
    "Training schedule": (
        Field("training.gate_epochs", 10, "gate epochs"),
        Field("training.contrastive_epochs", 1, "contrastive epochs"),
        Field("training.stage_epochs", [2, 4, 1], "epochs of stages 1, 2, 3"),
    ),
    "Trace horizon": (
        Field("training.horizon", 12, "horizon"),
        Field("training.short_horizon", 4, "steps in stage 1"),
    ),
    "Loss weights λ": (
        Field("training.weights.ce", 2.0, "CE"),
        Field("training.weights.kl", 0.2, "KL"),
        Field("training.weights.trajectory", 0.25, "trajectory"),
        Field("training.weights.preservation", 1.0, "preservation"),
        Field("training.weights.gate", 0.5, "gate BCE"),
    ),
    "Harmful-keep terms": (
        Field("training.weights.harmful_preservation", 1.5, "harmful preservation"),
        Field("training.weights.harmful_margin", 0.25, "harmful margin"),
        Field("training.hard_negatives", 5, "hard negatives"),
    ),
    "Regularization": (Field("training.weights.l2", 1e-4, "L2"),),
    "Optimizers": (
        Field("training.learning_rate", 3e-4, "learning rate"),
        Field("training.gate_learning_rate", 1e-3, "gate learning rate"),
        Field("training.contrastive_learning_rate", 3e-4, "contrastive learning rate"),
    ),
    "Reference distribution": (Field("training.top_k", 1024, "top-k"),),
    "Decode length": (
        Field("decoding.max_new_tokens", 64, "new tokens"),
        Field("decoding.do_sample", False, "sampling"),
    ),
    "Batching": (),
    "Edit target": (
        Field("training.targets", "reframe", "targets"),
        Field("targets_from", None, "targets from"),
    ),
}
# What table 5 leaves open; a run states its own choice, and nobody can say whether it is the paper's.
UNSAID = {
    "controller.pooling": "which positions of the prompt the router reads",
    "controller.gain_clip": "the bound of gain clipping",
    "training.rows_per_step": "the prompts of a step",
    "training.train_scale": "the scale in training",
    "training.margin": "the margin itself",
    "calibration.harmful_cost": "the weights of the calibration score",
}


def assembled(
    paper: PaperTable, settings: Sequence[Setting], blocks: Sequence[Block], notes: Sequence[str] = ()
) -> Reproduction:
    """A finished table: its blocks, and for every setting what is not the paper's protocol."""
    return Reproduction(
        table=paper.table,
        title=paper.title,
        runs=tuple(run.name for setting in settings for run in setting.runs),
        blocks=tuple(blocks),
        protocol=tuple(differing(setting, paper) for setting in settings),
        notes=(*notes, f"In the paper: {paper.protocol.note}"),
    )


def differing(setting: Setting, paper: PaperTable) -> str:
    """One sentence: what differs from this table's protocol, what the paper does not say, and if nothing does."""
    parts = protocol_differences(setting, paper)
    name = f"{setting.name}: "
    if not parts:
        return f"{name}the paper's protocol, in everything that the paper says about it."
    return f"{name}not the paper's protocol. Here (in the paper): {'; '.join(parts)}."


def protocol_differences(setting: Setting, paper: PaperTable) -> list[str]:
    """`horizon 40 (12)`, ...: every part of the protocol that the paper gives and that is not the run's."""
    return [
        *_backbone(setting, paper),
        *_sources(setting, paper),
        *_counts(setting, paper),
        *_judge(setting, paper),
        *_layers(setting),
        *_fields(setting, paper),
        *_operating_point(setting, paper),
        *_seeds(setting, paper),
    ]


def expected_layers(model: str, n_layers: int | None) -> tuple[int, int] | None:
    """First and last edited block in the paper: table 6's for its backbones, else all blocks after the router's 1-4."""
    name = paper_name(model)
    preset = preset_for(BACKBONES[name]) if name else None
    if preset is not None:
        return preset.edit_layers
    return None if n_layers is None else (5, n_layers - 1)


def edited_layers(run: Run) -> tuple[int, ...] | None:
    """As configured, or as the saved controller spelled them out; None before training."""
    return run.config.controller.edit_layers or run.edit_layers


def layers_text(layers: Sequence[int] | None) -> str:
    """(1, 2, 3, 4) -> "1-4", (8, 12, 16) -> "8, 12, 16"."""
    if not layers:
        return "n/a"
    whole = list(layers) == list(range(layers[0], layers[-1] + 1)) and len(layers) > 1
    return f"{layers[0]}-{layers[-1]}" if whole else ", ".join(map(str, layers))


def value_text(value: Any) -> str:
    """A setting's value in few characters; a path is shown by its last part."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
        case list() | tuple():
            return "/".join(value_text(v) for v in value)
        case str():
            return short_name(value)
    return str(value)


def held_out(metrics: Metrics) -> tuple[int, ...]:
    return _sizes(metrics, SplitName.HELD_OUT)


# --- the parts, in the order they are told --------------------------------------------------------------------------


def _backbone(setting: Setting, paper: PaperTable) -> list[str]:
    ours = paper_name(setting.config.model)
    shown = ours or short_name(setting.config.model)
    if paper.backbone is None:
        return [] if ours else [f"backbone {shown} (none of the paper's)"]
    theirs = paper_name(paper.backbone)
    return [] if ours == theirs else [f"backbone {shown} ({theirs})"]


def _sources(setting: Setting, paper: PaperTable) -> list[str]:
    config = setting.config
    chosen = {"edit": config.edit, "benign": config.benign, "harmful": config.harmful}
    if paper.protocol.same_source:
        return _same_source(chosen)
    return [
        f"{kind} prompts from {short_name(source)} ({SOURCES[kind][0]})"
        for kind, source in chosen.items()
        if source.partition("?")[0].lower() != SOURCES[kind][1].lower()
    ]


def _same_source(chosen: dict[str, str]) -> list[str]:
    stems = {kind: source.partition("?")[0] for kind, source in chosen.items()}
    apart = [kind for kind in ("benign", "harmful") if stems[kind] != stems["edit"]]
    told = [f"{kind} prompts from {short_name(stems[kind])} (the source of the edit prompts)" for kind in apart]
    if stems["edit"].lower() != "walledai/xstest":
        told.insert(0, f"edit prompts from {short_name(stems['edit'])} (XSTest)")
    return told


def _counts(setting: Setting, paper: PaperTable) -> list[str]:
    told = []
    for split, theirs, words in (
        (SplitName.TRAIN, paper.protocol.train, "training"),
        (SplitName.HELD_OUT, paper.protocol.held_out, "held-out"),
    ):
        ours = [_sizes(r.metrics, split) for r in setting.runs if r.metrics is not None]
        if theirs is None or not ours or all(n == theirs for n in ours):
            continue
        shown = ", ".join(dict.fromkeys("/".join(map(str, n)) for n in ours))
        told.append(f"{shown} {words} prompts ({'/'.join(map(str, theirs))})")
    return told


def _judge(setting: Setting, paper: PaperTable) -> list[str]:
    theirs, ours = paper.protocol.judges, setting.judge
    if not theirs or ours is None or any(name.lower() in _words(ours) for name in theirs):
        return []
    return [f"judge {ours} ({', '.join(theirs)})"]


def _words(judge: str) -> list[str]:
    """`hf:rubric=Qwen/Qwen3-4B,dtype=float32` -> its parts, lower case: names are compared whole."""
    return re.split(r"[\s:=/,]+", judge.lower())


def _layers(setting: Setting) -> list[str]:
    run = setting.runs[0]
    ours, theirs = edited_layers(run), expected_layers(run.config.model, run.n_layers)
    if ours is None or theirs is None or ours == tuple(range(theirs[0], theirs[1] + 1)):
        return []
    return [f"edited blocks {layers_text(ours)} ({theirs[0]}-{theirs[1]})"]


def _fields(setting: Setting, paper: PaperTable) -> list[str]:
    ours = leaves(setting.config)
    told = []
    for field in (f for fields in COMPONENTS.values() for f in fields):
        theirs, mine = field.value, ours[field.leaf]
        if field.leaf == "decoding.max_new_tokens":
            theirs = paper.protocol.max_new_tokens or mine  # other tables do not say how far they decoded
        if mine == theirs:
            continue
        as_layers = field.leaf == "controller.route_layers"
        shown = [layers_text(v) if as_layers else value_text(v) for v in (mine, theirs)]
        told.append(f"{field.words} {shown[0]} ({shown[1]})")
    return told


def _operating_point(setting: Setting, paper: PaperTable) -> list[str]:
    rows = [r.deployed for r in setting.runs if r.metrics is not None]
    rows = [r for r in rows if r is not None]
    if not rows:
        return []
    told = []
    theirs = _scales(setting, paper)
    if theirs and any(r.scale not in theirs for r in rows):
        ours = _distinct(f"{r.scale:g}" for r in rows if r.scale is not None)
        told.append(f"scale {ours} ({_distinct(f'{s:g}' for s in theirs)})")
    if any(r.policy != "thresholded" for r in rows):
        told.append(f"gate policy {_distinct(r.policy for r in rows)} (thresholded-soft)")
    return told


def _scales(setting: Setting, paper: PaperTable) -> tuple[float, ...]:
    """The table's own, else table 6's of the run's backbone, else of the table's."""
    name = paper_name(setting.config.model) or (paper_name(paper.backbone) if paper.backbone else None)
    if paper.protocol.scales or name is None:
        return paper.protocol.scales
    theirs = number(published("6").blocks[0].cell("Scale", name))
    return () if theirs is None else (theirs,)


def _seeds(setting: Setting, paper: PaperTable) -> list[str]:
    ours, theirs = len(setting.runs), paper.protocol.seeds
    return [] if ours == theirs else [f"{ours} {'seed' if ours == 1 else 'seeds'} ({theirs})"]


def _sizes(metrics: Metrics, split: SplitName) -> tuple[int, ...]:
    counts = metrics.buckets.get(split.value, {})
    return tuple(counts.get(b.value, 0) for b in Bucket)


def _distinct(words) -> str:
    return ", ".join(dict.fromkeys(words))


def unsaid(setting: Setting) -> str:
    """What the run had to choose because the paper does not say it."""
    ours = leaves(setting.config)
    return "; ".join(f"{words}: {value_text(ours[leaf])}" for leaf, words in UNSAID.items())
