"""What a router could know at best, by where it reads: linear probes of edit prompts against harmful keeps.

    python benchmarks/route_probes.py --data DIR [--seed 0] [--json]

Training and calibration prompts of a protocol's split (benchmarks/protocols.py; held-out prompts are not read), five folds
by group, three shuffles of the groups. `open` is the share of edit prompts above the third-highest harmful keep: what is
edited while two harmful keeps are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from paving.backbone import Backbone, load_backbone, render_batch
from paving.backbone.hooks import record_residuals
from paving.evaluation.statistics import auc
from paving.prompts.types import Bucket, Prompt, SplitName
from paving.run_splits import split_of
from protocols import LATE, cautious_model, paper, same_source

READS = (
    ("last", (1, 2, 3, 4)),
    ("mean", (1, 2, 3, 4)),
    ("last+mean", (1, 2, 3, 4)),
    ("last", (8, 12, 16)),
    ("mean", (8, 12, 16)),
    ("last+mean", (8, 12, 16)),
    ("last+mean", (12, 16, 20)),
    ("last+mean", (24,)),
)
FOLDS, SHUFFLES, LEAKED = 5, 3, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(".bench"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    organism = cautious_model(arguments.data, arguments.out)
    backbone = load_backbone(str(organism))
    results = {}
    for name, make in (("paper", paper), ("same-source", same_source)):
        splits = split_of(make(arguments.data, arguments.out, organism, arguments.seed, LATE)).splits
        prompts = [
            p
            for s in (SplitName.TRAIN, SplitName.CALIBRATION)
            for p in splits.of(s)
            if p.bucket in (Bucket.EDIT, Bucket.HARMFUL_KEEP)
        ]
        results[name] = probe_table(prompts, *prompt_states(backbone, prompts))
    print(json.dumps(results, indent=1) if arguments.json else as_text(results))


@torch.no_grad()
def prompt_states(backbone: Backbone, prompts: Sequence[Prompt], batch_size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """(last, mean): every block's output at the last prompt token and averaged over it, (n, n_layers, d) float32."""
    layers = range(backbone.n_layers)
    shape = (len(prompts), backbone.n_layers, backbone.d_model)
    last, mean = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].text), prompts[i].id))
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        batch = render_batch(backbone, [prompts[i] for i in index])
        with record_residuals(backbone, layers) as seen:
            backbone.model.get_decoder()(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )
        mask = batch.attention_mask[..., None]
        for layer in layers:
            resid = seen[layer].float()
            last[index, layer] = resid[:, -1].numpy()
            mean[index, layer] = ((resid * mask).sum(1) / mask.sum(1)).numpy()
    return last, mean


def probe_table(prompts: Sequence[Prompt], last: np.ndarray, mean: np.ndarray) -> list[dict]:
    y = np.array([p.bucket == Bucket.EDIT for p in prompts])
    groups = np.array([p.group for p in prompts])
    rows = []
    for pooling, layers in READS:
        parts = [states[:, list(layers)] for kind, states in (("last", last), ("mean", mean)) if kind in pooling]
        x = np.concatenate([part.reshape(len(y), -1) for part in parts], axis=1)
        found = [out_of_fold(x, y, groups, shuffle) for shuffle in range(SHUFFLES)]
        rows.append(
            {
                "pooling": pooling,
                "layers": layers,
                "auc": statistics.fmean(auc(s[y].tolist(), s[~y].tolist()) for s in found),
                "open": statistics.fmean(float((s[y] > np.sort(s[~y])[-1 - LEAKED]).mean()) for s in found),
            }
        )
    return rows


def out_of_fold(x: np.ndarray, y: np.ndarray, groups: np.ndarray, shuffle: int) -> np.ndarray:
    """Scores (n,) of probes that have not seen the prompt's group."""
    names = np.unique(groups)
    order = np.random.default_rng(shuffle).permutation(len(names))
    fold = dict(zip(names, order % FOLDS, strict=True))
    folds = np.array([fold[g] for g in groups])
    scores = np.zeros(len(y))
    for k in range(FOLDS):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=1e-2, max_iter=300, class_weight="balanced"))
        scores[folds == k] = probe.fit(x[folds != k], y[folds != k]).decision_function(x[folds == k])
    return scores


def as_text(results: dict[str, list[dict]]) -> str:
    lines = ["| read | " + " | ".join(f"{name}: AUC | open" for name in results) + " |"]
    lines.append("| --- " * (1 + 2 * len(results)) + "|")
    for rows in zip(*results.values(), strict=True):
        cells = [f"{r['auc']:.3f} | {100 * r['open']:.0f} %" for r in rows]
        lines.append(
            f"| {rows[0]['pooling']}, blocks {', '.join(map(str, rows[0]['layers']))} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
