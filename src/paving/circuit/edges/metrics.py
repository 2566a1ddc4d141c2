"""What a circuit is measured by: a number for the logits at the last prompt token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from paving.backbone import Backbone
from paving.circuit.mask import CircuitError
from paving.circuit.token_pairs import TokenPair, last_logits, pair_batches

Metric: TypeAlias = Callable[[Tensor], Tensor]
"""From logits at the last prompt token, (n, vocab) float32, to one number a row, (n,), differentiably."""

Metrics: TypeAlias = Metric | Sequence[Metric]
"""One metric for all pairs, or one a pair where it depends on the pair (KL from the pair's own clean run)."""


def measured(metrics: Metrics, logits: Tensor, rows: Sequence[int]) -> Tensor:
    """(n,): the metric of every row. logits: (n, vocab); rows: which pair each row is of.

    raises CircuitError if a metric does not give one number a row
    """
    if callable(metrics):
        values = metrics(logits)
    else:
        values = torch.cat([metrics[row](logits[i : i + 1]) for i, row in enumerate(rows)])
    if values.shape != (len(rows),):
        raise CircuitError(
            f"the metric gave {tuple(values.shape)} for logits {tuple(logits.shape)}; one number a row is needed: "
            f"({len(rows)},). Do not average over the batch."
        )
    return values


def check_metrics(metrics: Metrics, pairs: Sequence[TokenPair]) -> None:
    """raises CircuitError unless there is one metric for all, or one a pair"""
    if not callable(metrics) and len(metrics) != len(pairs):
        raise CircuitError(f"{len(metrics)} metrics for {len(pairs)} pairs; give one for all, or one a pair.")


def logit_difference(up: Sequence[int], down: Sequence[int]) -> Metric:
    """Mean logit of the tokens `up` less that of the tokens `down`."""
    return lambda logits: logits[:, list(up)].mean(-1) - logits[:, list(down)].mean(-1)


def kl_from(log_probs: Tensor) -> Metric:
    """KL(reference ‖ model) in nats. log_probs: (vocab,) of the reference distribution."""

    def metric(logits: Tensor) -> Tensor:
        reference = log_probs.to(logits)
        return (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1)

    return metric


@torch.no_grad()
def kl_from_clean(backbone: Backbone, pairs: Sequence[TokenPair], *, batch_size: int = 4) -> list[Metric]:
    """Per pair, KL from the clean run's own distribution (nats): 0 on the clean run. Hanna et al., section 3.

    Its gradient at the clean run is zero, so EAP with it scores every edge 0, and EAP-IG is needed.
    """
    found = []
    for batch in pair_batches(backbone, pairs, batch_size):
        found += [kl_from(row) for row in last_logits(backbone, batch.clean, batch.clean_mask).log_softmax(-1)]
    return found
