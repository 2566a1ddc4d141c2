"""Residual states of token rows, and the direction that tells two sets of them apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from paving.backbone import Backbone, PromptBatch, pad_left
from paving.backbone.hooks import record_residuals
from paving.steering.checks import SteeringError

Extraction = Literal["pca_pairwise", "pca_center", "mean"]
Tick = Callable[[int], None]


@torch.no_grad()
def tail_means(
    backbone: Backbone,
    rows: Sequence[Sequence[int]],
    tails: Sequence[int],
    layers: Sequence[int],
    *,
    batch_size: int,
    tick: Tick | None = None,
) -> Tensor:
    """Mean block output over the last tails[i] tokens of each row: (n_rows, n_layers, d_model) float32, on the CPU.

    One pass over the rows, in batches of similar length; `tick(n)` is called as n more rows are done.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = torch.empty((len(rows), len(layers), backbone.d_model))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        ids, mask = pad_left(backbone, [rows[i] for i in chunk])
        from_the_end = torch.arange(ids.shape[1], 0, -1, device=ids.device)
        counted = from_the_end <= torch.tensor([tails[i] for i in chunk], device=ids.device)[:, None]
        means = mean_states(backbone, ids, mask, counted, layers)
        found[chunk] = torch.stack([means[layer] for layer in layers], dim=1).cpu()
        if tick is not None:
            tick(len(chunk))
    return found


def mean_states(backbone: Backbone, ids: Tensor, mask: Tensor, counted: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """layer -> (n, d_model) float32: mean block output over the counted columns, from one unedited pass.

    ids, mask (n, width) int64, padded on the left; counted (n, width), true on the columns that count
    """
    weight = counted.float()[..., None]

    def pooled(resid: Tensor) -> Tensor:
        # In float32: a sum of bfloat16 loses what tells two prompts apart.
        return (resid.float() * weight).sum(1) / weight.sum(1)

    return read_states(backbone, ids, mask, layers, pooled)


def read_states(
    backbone: Backbone, ids: Tensor, mask: Tensor, layers: Sequence[int], keep: Callable[[Tensor], Tensor]
) -> dict[int, Tensor]:
    """layer -> keep(block output (n, width, d_model)), from one unedited pass."""
    batch = PromptBatch(ids, mask, ("",) * len(ids), (None,) * len(ids))
    with torch.no_grad(), record_residuals(backbone, layers, keep=keep) as seen:
        backbone.model.get_decoder()(input_ids=ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False)
    return seen


def direction(positive: Tensor, negative: Tensor, extraction: Extraction) -> Tensor:
    """The direction from `negative` to `positive` states, row i of one being the counterpart of row i of the other.

    positive, negative  (n, d_model) float32
    pca_pairwise        first principal component once each pair's midpoint is taken away (CAST's code, its default)
    pca_center          the same once the mean of all states is taken away (CAST's paper and tutorial)
    mean                mean difference, with its own length (CAA, arXiv 2312.06681)
    returns             (d_model,) float32; of length 1 for both PCAs, and signed so that more pairs have their
                        positive state further along it than have it the other way round

    raises SteeringError where the two sets do not differ
    """
    differences = (positive - negative).double()
    if not bool(differences.any()):
        raise SteeringError("the positive and the negative states are the same, so nothing tells them apart.")
    if extraction == "mean":
        return differences.mean(0).float()
    if extraction == "pca_pairwise":
        # Less their midpoint, a pair's two states are plus and minus half its difference.
        centred = differences
    else:
        states = torch.cat([positive, negative]).double()
        centred = states - states.mean(0)
    found = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    ahead = (differences @ found).sign().sum()
    return (found if ahead >= 0 else -found).float()
