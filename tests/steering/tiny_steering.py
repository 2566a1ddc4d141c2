"""Pairs, openings and directions for tiny models, where words are w0 to w189 and mean nothing."""

from __future__ import annotations

import torch

from paving.backbone import Backbone
from paving.steering import Behaviour
from paving.training.openings import Openings

OPENINGS = Openings(
    refusal=tuple(f"w{100 + i} w101 w{102 + i % 3}" for i in range(6)),
    compliance=tuple(f"w{140 + i} w141" for i in range(6)),
)


def _request(word: int, i: int) -> str:
    return " ".join([f"w{word}"] * (6 + i % 5) + [f"w{170 + i % 4}"])


# 7 to 11 words. One word of a side makes it plain even to a random model which side a request is on.
PAIRS = tuple((_request(1, i), _request(60, i + 2)) for i in range(12))


def behaviour(backbone: Backbone, layers=(2, 3), positions="all", seed: int = 0) -> Behaviour:
    """Random vectors of length 1."""
    generator = torch.Generator().manual_seed(seed)
    vectors = {layer: torch.randn(backbone.d_model, generator=generator) for layer in layers}
    vectors = {layer: v / v.norm() for layer, v in vectors.items()}
    return Behaviour(vectors, dict.fromkeys(layers, 1.0), positions, backbone.name, backbone.fingerprint)
