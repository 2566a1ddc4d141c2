"""What a router could read and how it could decide, one change at a time: edit prompts against harmful keeps, out of fold.

    python benchmarks/routing_features.py same-source [--out .bench] [--seeds 0 1 2] [--only NAME ...] [--json]

Reads finished runs of benchmarks/protocols.py: their training and calibration prompts, five folds by group, two shuffles a
seed; held-out prompts have no part in it. `open` is the share of edit prompts that open where 2 % of harmful keeps do.
Differences in AUC are to the first row, of the same prompts; intervals redraw groups. Rows are kept in
OUT/routing-features-PROTOCOL-seedN.json as they are found: a killed command goes on, and a row is found again where its
definition, the base, the prompts or the pairs have changed. Seeds can be run side by side.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from sklearn.metrics import roc_auc_score
from torch import Tensor

from gate_heads import (
    C_ATTENTION,
    C_LINEAR,
    C_RBF,
    HIDDEN,
    attention,
    hard_negatives,
    linear,
    perceptron,
    rbf,
    read_states,
    whitened,
)
from paving.backbone import Backbone
from paving.prompts.contrasts import groups_near, pair_of
from paving.prompts.types import Bucket, Prompt, SplitName, Splits
from paving.router_search import contrast_sets
from paving.traces.store import TraceStore
from paving.training.gate_search import folds_of, threshold_at
from routing_steps import finished_runs

FOLDS, SHUFFLES, SHARE, REDRAWS = 5, 2, 0.02, 1000
BLOCKS = (14, 16, 18)
LATER_KINDS = 438  # the number of the first pair that was written when the gates above were known


@dataclass(frozen=True)
class Variant:
    """pairs   contrast pairs it learns from: none, kinds, early kinds (the first 197), words, words+kinds
    own     how often the run's own prompts count; 0: it learns from pairs alone
    blocks  several sets: a machine each, scores averaged
    parts   what it reads of a prompt (gate_heads.read_states)
    head    linear, rbf, whitened, perceptron, attention
    members heads from so many seeds, scores averaged
    hard    the keeps that machines without them mix up count three times
    suffix  put behind the prompt before it is read
    """

    pairs: str = "kinds"
    own: int = 1
    blocks: tuple[tuple[int, ...], ...] = (BLOCKS,)
    parts: tuple[str, ...] = ("last", "mean")
    head: str = "rbf"
    members: int = 1
    hard: bool = False
    suffix: str = ""


REFERENCE = Variant()
SIX = ((8, 12, 16), (12, 16, 20), (14, 16, 18), (10, 14, 18), (16,), (20, 24))
VARIANTS: dict[str, Variant] = {
    "RBF machine, pairs of kinds, blocks 14, 16, 18, last+mean": REFERENCE,
    "no pairs": replace(REFERENCE, pairs="none"),
    "the first 197 pairs of kinds": replace(REFERENCE, pairs="early kinds"),
    "pairs of words as well, the last token of blocks 16, 20, 24": replace(
        REFERENCE, pairs="words+kinds", blocks=((16, 20, 24),), parts=("last",)
    ),
    "the same, without pairs": replace(REFERENCE, pairs="none", blocks=((16, 20, 24),), parts=("last",)),
    "the same, pairs of kinds": replace(REFERENCE, blocks=((16, 20, 24),), parts=("last",)),
    "the same, the first 197 pairs of kinds": replace(
        REFERENCE, pairs="early kinds", blocks=((16, 20, 24),), parts=("last",)
    ),
    "no pairs, blocks 8, 12, 16": replace(REFERENCE, pairs="none", blocks=((8, 12, 16),)),
    "pairs of words as well": replace(REFERENCE, pairs="words+kinds"),
    "pairs of words as well, own prompts three times": replace(REFERENCE, pairs="words+kinds", own=3),
    "pairs of words in place of own prompts": replace(REFERENCE, pairs="words", own=0),
    "pairs of kinds in place of own prompts": replace(REFERENCE, own=0),
    "the last token alone": replace(REFERENCE, parts=("last",)),
    "the mean over the user's words": replace(REFERENCE, parts=("last", "user")),
    "their maximum and minimum as well": replace(REFERENCE, parts=("last", "user", "extremes")),
    "all tokens after the user's words": replace(REFERENCE, parts=("tail", "mean")),
    "64 whitened principal components": replace(REFERENCE, head="whitened"),
    "six sets of blocks, averaged": replace(REFERENCE, blocks=SIX),
    "linear machine": replace(REFERENCE, head="linear"),
    "linear, on the mean alone": replace(REFERENCE, head="linear", parts=("mean",)),
    "linear, attention over tokens in place of the mean": replace(REFERENCE, head="attention"),
    "the same, five seeds averaged": replace(REFERENCE, head="attention", members=5),
    "MLP": replace(REFERENCE, head="perceptron"),
    "MLP, five seeds averaged": replace(REFERENCE, head="perceptron", members=5),
    "hard negatives three times": replace(REFERENCE, hard=True),
    "linear, hard negatives three times": replace(REFERENCE, head="linear", hard=True),
    "asked: The person asking this wants to, block 20": replace(
        REFERENCE, blocks=((20,),), suffix="The person asking this wants to"
    ),
    "asked: This request is, block 20": replace(REFERENCE, blocks=((20,),), suffix="This request is"),
    "not asked, block 20": replace(REFERENCE, blocks=((20,),)),
}
ORDER = (Bucket.EDIT, Bucket.HARMFUL_KEEP)
Shuffles = Sequence[Mapping[str, float]]  # one seed's scores by prompt id, of each shuffle
HEADS = {"linear": lambda _n: linear, "rbf": lambda _n: rbf, "whitened": lambda _n: whitened(64), "perceptron": perceptron}


class Found(BaseModel):
    """A variant on one seed. made_of: names base, prompts, groups, pairs and the heads' constants.
    scores[shuffle][prompt id]: out of fold, of edit prompts and harmful keeps."""

    model_config = ConfigDict(extra="forbid")

    variant: dict
    made_of: str
    scores: list[dict[str, float]]


@dataclass(frozen=True)
class Material:
    """One seed's prompts and what was read of them and of the pairs, by suffix."""

    prompts: tuple[Prompt, ...]
    pairs: Mapping[str, tuple[Prompt, ...]]
    states: Callable[[str], tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]]
    layers: tuple[int, ...]
    made_of: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=("paper", "same-source"))
    parser.add_argument("--out", type=Path, default=Path(".bench"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), metavar="NAME", default=list(VARIANTS))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    names = [name for name in VARIANTS if name in arguments.only or VARIANTS[name] == REFERENCE]
    seeds: list[dict[str, Found]] = []
    prompts: dict[str, Prompt] = {}
    for seed, _run, splits, backbone in finished_runs(arguments):
        material = material_of(backbone, splits)
        prompts |= {p.id: p for p in material.prompts}
        kept = arguments.out / f"routing-features-{arguments.protocol}-seed{seed}.json"
        seeds.append({name: found(kept, name, material) for name in names})
    rows = [summary(name, seeds, prompts) for name in names]
    print(json.dumps(rows, indent=1) if arguments.json else as_text(rows))


def material_of(backbone: Backbone, splits: Splits) -> Material:
    prompts = tuple(p for s in (SplitName.TRAIN, SplitName.CALIBRATION) for p in splits.of(s) if p.bucket in ORDER)
    contrasts, _ = contrast_sets("starter", splits.held_out)
    kinds, both = (tuple(contrasts[name]) for name in ("kinds", "words+kinds"))
    early = tuple(p for p in kinds if int(pair_of(p).rsplit("-", 1)[1]) < LATER_KINDS)
    words = tuple(p for p in both if p not in set(kinds))
    pairs = {"none": (), "kinds": kinds, "early kinds": early, "words+kinds": both, "words": words}
    layers = tuple(sorted({layer for v in VARIANTS.values() for one in v.blocks for layer in one}))
    read: dict[str, tuple] = {}

    def states(suffix: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        if suffix not in read:
            read[suffix] = read_states(backbone, [*prompts, *both], layers, suffix=suffix)
        return read[suffix]

    made_of = TraceStore.key(
        base=backbone.fingerprint,
        prompts=[(p.id, p.text, p.bucket.value, p.group) for p in prompts],
        pairs={name: [(p.id, p.text) for p in chosen] for name, chosen in pairs.items()},
        constants=[FOLDS, SHUFFLES, C_RBF, C_LINEAR, C_ATTENTION, HIDDEN],
    )
    return Material(prompts, pairs, states, layers, made_of)


def found(kept: Path, name: str, material: Material) -> Found:
    variant = json.loads(json.dumps(asdict(VARIANTS[name])))
    records = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    known = records.get(name)
    if known is not None and known["variant"] == variant and known["made_of"] == material.made_of:
        return Found.model_validate(known)
    print(f"{kept.stem}: {name}", file=sys.stderr, flush=True)
    result = Found(variant=variant, made_of=material.made_of, scores=out_of_fold(VARIANTS[name], material))
    records[name] = result.model_dump()
    part = kept.with_suffix(".part")
    part.write_text(json.dumps(records), encoding="utf-8")
    part.replace(kept)
    return result


def out_of_fold(variant: Variant, material: Material) -> list[dict[str, float]]:
    """Each prompt's score by heads that have seen no prompt of its group, and no pair of it or like it."""
    prompts = material.prompts
    near = groups_near(material.pairs[variant.pairs], prompts)
    rows = [*prompts, *near]
    y = np.array([p.bucket is Bucket.EDIT for p in rows])
    own = np.arange(len(rows)) < len(prompts)
    weights = np.where(own, float(variant.own), 1.0)
    found: list[dict[str, float]] = []
    for shuffle in range(SHUFFLES):
        fold = folds_of([p.group for p in prompts], FOLDS, shuffle)
        scores = np.zeros(len(prompts))
        for k in range(FOLDS):
            left_out = {p.group.casefold() for p, f in zip(prompts, fold, strict=True) if f == k}
            usable = np.array([not groups & left_out for groups in near.values()], dtype=bool)
            seen = np.concatenate([fold != k, usable]) & (weights > 0)
            judged = np.flatnonzero(fold == k)
            scores[judged] = np.mean(
                [fold_scores(variant, blocks, material, rows, y, weights, seen, judged) for blocks in variant.blocks], axis=0
            )
        found.append({p.id: float(s) for p, s in zip(prompts, scores, strict=True)})
    return found


def fold_scores(
    variant: Variant,
    blocks: tuple[int, ...],
    material: Material,
    rows: Sequence[Prompt],
    y: np.ndarray,
    weights: np.ndarray,
    seen: np.ndarray,
    judged: np.ndarray,
) -> np.ndarray:
    """(n_judged,) scores of one fold's head on one set of blocks."""
    places = [material.layers.index(b) for b in blocks]
    parts, every = material.states(variant.suffix)
    shown = [rows[i] for i in np.flatnonzero(seen)]
    if variant.head == "attention":
        tokens, mask = padded([every[p.id][:, places].flatten(1) for p in shown])
        score = attention(tokens, mask, y[seen], weights[seen], members=variant.members)
        return score(*padded([every[rows[i].id][:, places].flatten(1) for i in judged]))
    x = np.stack([torch.cat([parts[p.id][part][places].flatten() for part in variant.parts]).numpy() for p in shown])
    there = np.stack(
        [torch.cat([parts[rows[i].id][part][places].flatten() for part in variant.parts]).numpy() for i in judged]
    )
    head, shares = HEADS[variant.head](variant.members), weights[seen]
    if variant.hard:
        shares = hard_negatives(head, x, y[seen], shares, folds_of([p.group for p in shown], FOLDS, 0))
    return head(x, y[seen], shares)(there)


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(n, longest, columns) and (n, longest), 1 where a token stands."""
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True), mask


def summary(name: str, seeds: Sequence[Mapping[str, Found]], prompts: Mapping[str, Prompt]) -> dict:
    reference = next(iter(VARIANTS))
    ours, theirs = [[run[which].scores for run in seeds] for which in (name, reference)]
    opened = [opened_at(shuffles, prompts) for shuffles in ours]
    gains = [mean_auc(a, prompts) - mean_auc(b, prompts) for a, b in zip(ours, theirs, strict=True)]
    low, high = difference_interval(ours, theirs, prompts)
    return {
        "name": name,
        "auc": [mean_auc(shuffles, prompts) for shuffles in ours],
        "open": opened,
        "difference": float(np.mean(gains)),
        "interval": None if name == reference else [low, high],
        "prompts": [len(shuffles[0]) for shuffles in ours],
    }


def mean_auc(shuffles: Shuffles, prompts: Mapping[str, Prompt]) -> float:
    ids = list(shuffles[0])
    labels = [prompts[i].bucket is Bucket.EDIT for i in ids]
    return float(np.mean([roc_auc_score(labels, [s[i] for i in ids]) for s in shuffles]))


def opened_at(shuffles: Shuffles, prompts: Mapping[str, Prompt]) -> float:
    edit, keeps = [np.array([[s[i] for i in s if prompts[i].bucket is bucket] for s in shuffles]) for bucket in ORDER]
    return float((edit > threshold_at(keeps, SHARE)).mean())


def difference_interval(
    ours: Sequence[Shuffles], theirs: Sequence[Shuffles], prompts: Mapping[str, Prompt]
) -> tuple[float, float]:
    """95 %, of the mean over seeds: groups are redrawn, with all their prompts in every seed."""
    groups = sorted({prompts[i].group for shuffles in ours for i in shuffles[0]})
    place = {group: k for k, group in enumerate(groups)}
    sides = [[np.array([place[prompts[i].group] for i in s[0] if prompts[i].bucket is b]) for b in ORDER] for s in ours]
    gains = [won(a, prompts) - won(b, prompts) for a, b in zip(ours, theirs, strict=True)]
    rng, found = np.random.default_rng(0), []
    for _ in range(REDRAWS):
        times = np.bincount(rng.integers(len(groups), size=len(groups)), minlength=len(groups))
        drawn = [(times[edit], times[keeps]) for edit, keeps in sides]
        found.append(np.mean([e @ gain @ k / max(e.sum() * k.sum(), 1) for gain, (e, k) in zip(gains, drawn, strict=True)]))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def won(shuffles: Shuffles, prompts: Mapping[str, Prompt]) -> np.ndarray:
    """(n_edit, n_harmful): how often the edit prompt scores higher, ties half; its mean is the AUC."""
    sides = [np.array([[s[i] for i in s if prompts[i].bucket is bucket] for s in shuffles]) for bucket in ORDER]
    edit, keeps = sides[0][:, :, None], sides[1][:, None, :]
    return ((edit > keeps) + 0.5 * (edit == keeps)).mean(0)


def as_text(rows: Sequence[dict]) -> str:
    lines = ["| read and decided by | AUC (by seed) | difference | open |", "| --- | --- | --- | --- |"]
    for row in rows:
        each = ", ".join(f"{a:.3f}" for a in row["auc"])
        apart = "" if row["interval"] is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(row["difference"], *row["interval"])
        lines.append(
            f"| {row['name']} | {np.mean(row['auc']):.3f} ({each}) | {apart} | {100 * np.mean(row['open']):.0f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
