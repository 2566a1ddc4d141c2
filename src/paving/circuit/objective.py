"""What the circuit is found for: the objective J of C-ΔΘ, and the reference distributions it compares with."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from paving.backbone import Backbone, pad_left, render_ids
from paving.circuit.mask import CircuitError
from paving.circuit.pairs import Pair
from paving.circuit.token_pairs import last_logits
from paving.training.openings import Openings

Reference = Literal["after", "opening"]
Objective = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class References:
    """p_refuse and p_comply, (vocab,) float32 each, summing to 1."""

    refuse: Tensor
    comply: Tensor


def references(
    backbone: Backbone, pairs: Sequence[Pair], openings: Openings, *, kind: Reference = "after", seed: int = 0
) -> References:
    """Mean next-token distributions of the base, one opening phrase drawn for each pair.

    kind  `after`: what follows x_harm ⊕ r, and x_benign ⊕ c, as the paper writes it; `opening`: the first tokens of
          r and c themselves, which is what the first generated position t* holds when the answer is r or c
    """
    if not pairs:
        raise CircuitError("a category without pairs has no circuit. Give pairs: see paving circuit find --help")
    rng = random.Random(seed)
    drawn = [(p, rng.choice(openings.refusal), rng.choice(openings.compliance)) for p in pairs]
    if kind == "opening":
        firsts = [(_tokens(backbone, r)[0], _tokens(backbone, c)[0]) for _, r, c in drawn]
        refuse, comply = (torch.tensor(side, device=backbone.device) for side in zip(*firsts, strict=True))
        vocabulary = backbone.model.get_output_embeddings().weight.shape[0]
        return References(_histogram(refuse, vocabulary), _histogram(comply, vocabulary))
    harmful = [render_ids(backbone, p.harmful) + _tokens(backbone, r) for p, r, _ in drawn]
    benign = [render_ids(backbone, p.benign) + _tokens(backbone, c) for p, _, c in drawn]
    return References(_mean_distribution(backbone, harmful), _mean_distribution(backbone, benign))


def objective(reference: References) -> Objective:
    """J: logits (n, vocab) of the first generated position -> (n,), KL(p_refuse ‖ p) − KL(p_comply ‖ p).

    Both references sum to 1, so the normaliser of p cancels and J is linear in the logits: Σ (p_comply − p_refuse)·logits
    and a constant. It falls as p comes closer to refusal; the paper's text says the opposite of its formula.
    """
    direction = reference.comply - reference.refuse
    constant = _negative_entropy(reference.refuse) - _negative_entropy(reference.comply)
    return lambda logits: logits.float() @ direction + constant


def _negative_entropy(p: Tensor) -> Tensor:
    return torch.special.xlogy(p, p).sum()


def _tokens(backbone: Backbone, text: str) -> list[int]:
    return backbone.tokenizer(text, add_special_tokens=False)["input_ids"]


def _histogram(tokens: Tensor, vocabulary: int) -> Tensor:
    return torch.bincount(tokens, minlength=vocabulary).float() / len(tokens)


@torch.no_grad()
def _mean_distribution(backbone: Backbone, rows: Sequence[Sequence[int]], batch_size: int = 8) -> Tensor:
    total: Tensor | None = None
    ordered = sorted(rows, key=len)
    for start in range(0, len(ordered), batch_size):
        ids, mask = pad_left(backbone, ordered[start : start + batch_size])
        p = last_logits(backbone, ids, mask).softmax(-1).sum(0)
        total = p if total is None else total + p
    return total / len(rows)
