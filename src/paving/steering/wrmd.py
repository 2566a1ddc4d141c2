"""Refusal steering by WRMD, the ridge-regularised, confidence-weighted mean difference (arXiv 2512.16602), reconstructed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from sklearn.metrics import roc_auc_score
from torch import Tensor

from paving.backbone import Backbone, PromptBatch, checked_ids
from paving.backbone.hooks import edit_residuals
from paving.prompts.types import Bucket, Prompt, SplitName
from paving.steering.checks import SteeringError
from paving.steering.material import Material
from paving.steering.row_edits import adding, row_edit
from paving.steering.states import Tick, tail_means

Positive = Annotated[float, Field(gt=0)]


class WRMDConfig(BaseModel):
    """What the paper chooses automatically is chosen among these.

    buckets     whose prompts are read: those whose refusals are to go, and those that show compliance
    ridges      λ, in units of the mean variance of a coordinate of the complying states at the layer
    candidates  blocks that may be edited; default: all
    n_layers    how many are; default: a fifth of the candidates, rounded up
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    buckets: tuple[Bucket, ...] = Field((Bucket.EDIT, Bucket.BENIGN_KEEP), min_length=1)
    ridges: tuple[Positive, ...] = Field((0.01, 0.1, 1.0, 10.0, 100.0), min_length=1)
    candidates: tuple[int, ...] | None = Field(None, min_length=1)
    n_layers: int | None = Field(None, ge=1)
    batch_size: int = Field(16, ge=1)


@dataclass(frozen=True)
class Choice:
    """One layer with one ridge, and how well it tells refusing from complying calibration prompts apart.

    auc         of the states' projections on the vector: 0.5 is chance
    separation  distance of the two means of projections over their pooled standard deviation
    gap         distance of the two weighted means of the training states along the vector of length 1, residual units
    """

    layer: int
    ridge: float
    auc: float
    separation: float
    gap: float


@dataclass(frozen=True)
class RefusalSteering:
    """h_l ← h_l − s · v_l at the chosen blocks' outputs, all positions: less refusal.

    vectors  layer -> (d_model,) float32, in residual units: the layer's gap along its direction, over the number of layers.
             At s = 1 all layers together move a state about as far as refusing states lie from complying ones
    choices  the chosen layers' ridges and separations, best first

    Strengths from about 0.25 to 4, in gaps; there is no published scale to compare them with.
    """

    vectors: Mapping[int, Tensor]
    choices: tuple[Choice, ...]

    @contextmanager
    def editing(self, backbone: Backbone, batch: PromptBatch, strength: Tensor) -> Iterator[None]:
        edits = {layer: row_edit(adding(-v), strength, batch) for layer, v in self.vectors.items()}
        with edit_residuals(backbone, edits):
            yield


def fit_wrmd(
    backbone: Backbone,
    material: Material,
    confidence: Mapping[str, float],
    config: WRMDConfig | None = None,
    *,
    tick: Tick | None = None,
) -> RefusalSteering:
    """v = (Σ + λ I)⁻¹ (weighted mean of refusing states − weighted mean of complying states), at several layers.

    confidence  prompt's id -> a judge's confidence in [0, 1] that the base's answer refuses; every training and calibration
                prompt of the buckets has one. From 0.5 up a prompt counts as refusing, with weight c; below as complying,
                with weight 1 − c
    tick        called with how many more prompts have been read

    Reconstructed from the paper's description, which gives the estimator and that a judge's confidences, several layers and
    an automatic choice belong to it. Ours are: states of the last prompt token; Σ, the weighted covariance of the complying
    states; λ as a multiple of their mean variance; per layer the ridge, and then the layers, by AUC and then separation of
    the projections of calibration prompts; the length of the vectors.

    raises SteeringError without a confidence in [0, 1] for every prompt, or without both kinds of prompts in both splits
    """
    config = config or WRMDConfig()
    layers = config.candidates or tuple(range(backbone.n_layers))
    backbone.check_layers(layers, "WRMD")
    train, held = (
        _states(backbone, material, split, confidence, layers, config, tick)
        for split in (SplitName.TRAIN, SplitName.CALIBRATION)
    )
    best = []
    for i, layer in enumerate(layers):
        z, z_held = train.states[:, i], held.states[:, i]
        variance = complying_covariance(z, train.confidence).diagonal().mean()
        options = []
        for ridge in config.ridges:
            v = weighted_ridge_difference(z, train.confidence, ridge * float(variance))
            unit = v / v.norm()
            options.append((Choice(layer, ridge, *_separates(z_held @ unit, held.confidence), _gap(z @ unit, train)), unit))
        best.append(max(options, key=lambda o: (o[0].auc, o[0].separation)))
    best.sort(key=lambda o: (o[0].auc, o[0].separation), reverse=True)
    chosen = best[: config.n_layers or -(-len(layers) // 5)]
    vectors = {choice.layer: (unit * choice.gap / len(chosen)).float() for choice, unit in chosen}
    return RefusalSteering(vectors, tuple(choice for choice, _ in chosen))


def weighted_ridge_difference(states: Tensor, confidence: Tensor, ridge: float) -> Tensor:
    """(Σ + λ I)⁻¹ (μ_refusing − μ_complying), (d_model,) float64.

    states      (n, d_model) float64
    confidence  (n,) float64 in [0, 1]: that the row refuses; from 0.5 up it is a refusing row of weight c, below it is a
                complying row of weight 1 − c
    ridge       λ, in squared residual units

    raises SteeringError where the two means do not differ, or (with λ = 0) Σ has no inverse
    """
    refusing, complying = weighted_means(states, confidence)
    eye = torch.eye(states.shape[1], dtype=states.dtype)
    try:
        found = torch.linalg.solve(complying_covariance(states, confidence) + ridge * eye, refusing - complying)
    except torch.linalg.LinAlgError as error:
        raise SteeringError(f"the complying states' covariance has no inverse with a ridge of {ridge}: raise it.") from error
    if not bool(torch.isfinite(found).all()) or not bool(found.any()):
        raise SteeringError(
            "refusing and complying states do not differ, or are not finite, so WRMD has no direction. Take another layer."
        )
    return found


def weighted_means(states: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
    """(refusing, complying), each (d_model,) float64."""
    refuses = confidence >= 0.5
    weights = (torch.where(refuses, confidence, 0), torch.where(refuses, 0, 1 - confidence))
    refusing, complying = ((w @ states) / w.sum() for w in weights)
    return refusing, complying


def complying_covariance(states: Tensor, confidence: Tensor) -> Tensor:
    """(d_model, d_model) float64: Σ_i w_i (x_i − μ)(x_i − μ)ᵀ / Σ_i w_i over complying rows, w = 1 − c, μ their mean."""
    weight = torch.where(confidence >= 0.5, 0, 1 - confidence)
    centred = states - weighted_means(states, confidence)[1]
    return (centred * weight[:, None]).T @ centred / weight.sum()


@dataclass(frozen=True)
class _Read:
    """states (n, n_layers, d_model) float64 at the last prompt token; confidence (n,) float64."""

    states: Tensor
    confidence: Tensor


def _states(
    backbone: Backbone,
    material: Material,
    split: SplitName,
    confidence: Mapping[str, float],
    layers: Sequence[int],
    config: WRMDConfig,
    tick: Tick | None,
) -> _Read:
    prompts = [p for bucket in config.buckets for p in material.of(split, bucket)]
    c = _confidences(prompts, confidence, split)
    rows = [checked_ids(backbone, p) for p in prompts]
    states = tail_means(backbone, rows, [1] * len(rows), layers, batch_size=config.batch_size, tick=tick)
    return _Read(states.double(), c)


def _confidences(prompts: Sequence[Prompt], confidence: Mapping[str, float], split: SplitName) -> Tensor:
    wrong = [p.id for p in prompts if not 0 <= confidence.get(p.id, -1) <= 1]
    if wrong:
        raise SteeringError(
            f"{len(wrong)} {split.value} prompts have no refusal confidence between 0 and 1 (first: {wrong[0]}: "
            f"{confidence.get(wrong[0], 'n/a')}). Judge the base's answers to all of them first."
        )
    found = torch.tensor([confidence[p.id] for p in prompts], dtype=torch.float64)
    if (found >= 0.5).all() or (found < 0.5).all():
        raise SteeringError(
            f"the base {'refuses all' if found[0] >= 0.5 else 'answers all'} {len(found)} {split.value} prompts, by the "
            "confidences given: WRMD needs prompts of both kinds in training and calibration."
        )
    return found


def _separates(projected: Tensor, confidence: Tensor) -> tuple[float, float]:
    """(AUC, separation) of projections (n,), the refusing ones being the positive."""
    refuses = confidence >= 0.5
    one, two = projected[refuses], projected[~refuses]
    spread = ((one.var(correction=0) * len(one) + two.var(correction=0) * len(two)) / len(projected)).sqrt()
    return float(roc_auc_score(refuses.numpy(), projected.numpy())), float((one.mean() - two.mean()) / spread)


def _gap(projected: Tensor, train: _Read) -> float:
    refusing, complying = weighted_means(projected[:, None], train.confidence)
    return float(refusing - complying)
