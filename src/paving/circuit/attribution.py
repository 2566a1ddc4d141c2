"""EAP-IG at component level: how much each channel of the FFN output projections carries refusal (C-ΔΘ, stage 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from paving.backbone import Backbone
from paving.backbone.hooks import edit_module_inputs, edit_module_outputs
from paving.backbone.projections import Projection, ffn_outputs
from paving.circuit.mask import CircuitError, Reading
from paving.circuit.objective import Objective
from paving.circuit.pairs import Pair
from paving.circuit.token_pairs import PairBatch, last_logits, pair_batches, token_pairs

Tick = Callable[[int], None]


class AttributionConfig(BaseModel):
    """How channels are scored.

    steps   m of the integrated gradients
    path    `inputs`: the token embeddings go from benign to harmful and every channel's gradient is taken on the way
            (EAP-IG of Hanna et al. 2024, arXiv 2403.17806); `activations`: each layer's channels go from benign to
            harmful by themselves, which costs a pass per layer and step
    signed  mean of −score instead of mean of |score|: channels that push towards refusal first
    first   the first block left in (the paper leaves block 0 out)
    batch_size  pairs at a time: four are a fifth faster on the embedded model, and hold 2.5 times its weights
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    reading: Reading = "neurons"
    steps: int = Field(3, ge=1)
    path: Literal["inputs", "activations"] = "inputs"
    signed: bool = False
    first: int = Field(1, ge=0)
    batch_size: int = Field(2, ge=1)


def attribute(
    backbone: Backbone, pairs: Sequence[Pair], j: Objective, config: AttributionConfig, tick: Tick | None = None
) -> dict[int, Tensor]:
    """S(u): layer -> (channels,) float64 on the CPU, the mean over pairs of |score|, or of −score where signed.

    score(u) = Σ_positions (a_harm − a_benign) · 1/m Σ_k ∂J/∂a at benign + k/m·(harmful − benign), k = 1..m.

    Pairs of unequal length are aligned at the last prompt tokens: the i-th token from the end of one side stands
    against the i-th from the end of the other. Where only the harmful prompt has a token, its own activation stands on
    both sides (difference 0, nothing interpolated); tokens that only the benign prompt has are not looked at.
    From batch to batch only the sums are kept. What a process holds resident is measured in benchmarks/circuit_cost.py.

    raises CircuitError without pairs, if no block is left to look at, for a prompt that does not fit the context, and
    where scores are no numbers
    """
    projections = {layer: p for layer, p in ffn_outputs(backbone).items() if layer >= config.first}
    if not pairs or not projections:
        raise CircuitError(f"nothing to attribute: {len(pairs)} pairs, {len(projections)} blocks from {config.first} on.")
    score = _along_inputs if config.path == "inputs" else _along_activations
    sums: dict[int, Tensor] = {}
    longest_first = sorted(token_pairs(backbone, pairs), key=lambda p: -max(len(p.clean), len(p.corrupt)))
    for batch in pair_batches(backbone, longest_first, config.batch_size):  # the rest then fits into what is held
        for layer, scores in score(backbone, projections, batch, j, config).items():
            part = (-scores if config.signed else scores.abs()).cpu().double().sum(0)
            if not part.isfinite().all():
                raise CircuitError(
                    f"attribution gives no numbers in layer {layer}: activations or gradients overflow in "
                    f"{str(projections[layer].weight.dtype).removeprefix('torch.')}. Load the model in another dtype (dtype "
                    "in --config; bfloat16 overflows as late as float32), in another run folder."
                )
            sums[layer] = sums[layer] + part if layer in sums else part
        if tick is not None:
            tick(batch.clean.shape[0])
    return {layer: total / len(pairs) for layer, total in sums.items()}


def _along_inputs(
    backbone: Backbone, projections: dict[int, Projection], batch: PairBatch, j: Objective, config: AttributionConfig
) -> dict[int, Tensor]:
    """layer -> (n, channels): every channel's score, one pass with gradients a step."""
    embed = backbone.model.get_input_embeddings()
    harmful = embed(batch.clean).detach()
    benign = torch.where(batch.shared, embed(batch.corrupt).detach(), harmful)
    difference = _differences(backbone, projections, batch, config.reading)
    scores: dict[int, Tensor] = {}
    for k in range(1, config.steps + 1):
        point = (benign + (harmful - benign) * (k / config.steps)).requires_grad_()
        with channels(projections, config.reading) as seen, torch.enable_grad():
            value = j(last_logits(backbone, batch.clean, batch.clean_mask, embeddings=point)).sum()
            gradients = torch.autograd.grad(value, list(seen.values()))
        for layer, gradient in zip(seen, gradients, strict=True):
            part = (gradient.float() * difference[layer]).sum(1) / config.steps
            scores[layer] = scores[layer] + part if layer in scores else part
    return scores


def _along_activations(
    backbone: Backbone, projections: dict[int, Projection], batch: PairBatch, j: Objective, config: AttributionConfig
) -> dict[int, Tensor]:
    difference = _differences(backbone, projections, batch, config.reading)
    with torch.no_grad(), channels(projections, config.reading) as harmful:
        last_logits(backbone, batch.clean, batch.clean_mask)
    scores = {}
    for layer, projection in projections.items():
        total = 0
        for k in range(1, config.steps + 1):
            away = 1 - k / config.steps
            point = (harmful[layer] - difference[layer].to(harmful[layer].dtype) * away).detach().requires_grad_()
            with _replaced(projection, config.reading, point), torch.enable_grad():
                value = j(last_logits(backbone, batch.clean, batch.clean_mask)).sum()
                total = total + torch.autograd.grad(value, point)[0].float()
        scores[layer] = (total * difference[layer]).sum(1) / config.steps
    return scores


@torch.no_grad()
def _differences(
    backbone: Backbone, projections: dict[int, Projection], batch: PairBatch, reading: Reading
) -> dict[int, Tensor]:
    """layer -> (n, width, channels): harmful − benign activations, 0 where the two are not aligned."""
    with channels(projections, reading) as benign:
        last_logits(backbone, batch.corrupt, batch.corrupt_mask)
    with channels(projections, reading) as harmful:
        last_logits(backbone, batch.clean, batch.clean_mask)
    return {layer: torch.where(batch.shared, harmful[layer] - benign[layer], 0) for layer in projections}


@contextmanager
def channels(projections: dict[int, Projection], reading: Reading) -> Iterator[dict[int, Tensor]]:
    """While open, the channels of each projection are kept: its input (neurons) or its output, (n, width, channels)."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int, activation: Tensor) -> None:
        seen[layer] = activation

    modules = {p.module: layer for layer, p in projections.items()}
    if reading == "neurons":
        hooks = edit_module_inputs({m: lambda x, at=layer: keep(at, x) for m, layer in modules.items()})
    else:
        hooks = edit_module_outputs({m: lambda _x, y, at=layer: keep(at, y) for m, layer in modules.items()})
    with hooks:
        yield seen


def _replaced(projection: Projection, reading: Reading, activation: Tensor):
    if reading == "neurons":
        return edit_module_inputs({projection.module: lambda _x: activation})
    return edit_module_outputs({projection.module: lambda _x, _y: activation})
