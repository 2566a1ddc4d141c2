"""Which rows a one-direction method edits: all, those that a linear probe opens, or those that the labels name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from paving.backbone import Backbone, PromptBatch
from paving.intervention import RowState
from paving.prompts.types import Bucket
from paving.steering.checks import SteeringError
from paving.traces.boundary import boundary_states


@dataclass(frozen=True)
class Global:
    """Every row."""

    name: str = "global"

    def route(self, backbone: Backbone, batch: PromptBatch) -> tuple[RowState, ...]:
        return (RowState(gate=1.0),) * len(batch)


@dataclass(frozen=True)
class Labelled:
    """The true label in place of a gate: the oracle (Residual Paving, section 3.4). A diagnostic, never deployable."""

    name: str = "oracle"

    def route(self, backbone: Backbone, batch: PromptBatch) -> tuple[RowState, ...]:
        missing = [i for i, b in zip(batch.ids, batch.bucket, strict=True) if b is None]
        if missing:
            raise SteeringError(
                f"oracle routing needs the true bucket of every prompt; {len(missing)} have none (first: {missing[0]}). "
                "Route by a probe where labels are not known."
            )
        return tuple(RowState(gate=float(b == Bucket.EDIT)) for b in batch.bucket)


@dataclass(frozen=True)
class Linear:
    """A linear classifier of boundary states: logit = ((z − mean) / std) · weight + bias; positive above the threshold."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: float
    threshold: float = 0.0

    def margin(self, z: Tensor) -> Tensor:
        """(n, n_features) float32 -> (n,): how far above its threshold each row lies."""
        standard = (z - self.mean.to(z.device)) / self.std.to(z.device)
        return standard @ self.weight.to(z.device) + self.bias - self.threshold


@dataclass(frozen=True)
class Probe:
    """Open where a probe takes the prompt for an edit prompt, unless the veto takes it for a harmful keep.

    layers, pooling  what is read, in one unedited pass over the prompts, as the run's router reads it
    edit             edit prompts against both kinds of keeps
    veto             harmful keeps against the others; None: no veto
    """

    layers: tuple[int, ...]
    pooling: str
    edit: Linear
    veto: Linear | None = None

    @property
    def name(self) -> str:
        return "probe" if self.veto is None else "probe+veto"

    def route(self, backbone: Backbone, batch: PromptBatch) -> tuple[RowState, ...]:
        z = boundary_states(backbone, batch, self.layers, self.pooling)
        margins = self.edit.margin(z)
        vetoed = [None] * len(batch) if self.veto is None else (self.veto.margin(z) > 0).tolist()
        return tuple(
            RowState(gate=float(m > 0 and not v), logit=m, veto=v) for m, v in zip(margins.tolist(), vetoed, strict=True)
        )


PROBE_C = 0.01  # as of the linear gates that a gate search tries: thousands of features, some hundred prompts


def fit_probe(z: Tensor, is_edit: Sequence[bool], *, c: float = PROBE_C) -> Linear:
    """Logistic regression on standardised boundary states, both classes weighing the same. z: (n, n_features) float32.

    c: scikit-learn's C, the inverse of the penalty on squared weights
    raises SteeringError unless both classes are there
    """
    if len(set(is_edit)) < 2:
        raise SteeringError("a probe needs edit prompts and keeps to tell apart; the training split has only one kind.")
    mean, std = z.mean(0), z.std(0).clamp_min(1e-4)
    x = ((z - mean) / std).double().cpu().numpy()
    fitted = LogisticRegression(C=c, class_weight="balanced", max_iter=2000).fit(x, list(is_edit))
    return Linear(mean, std, torch.tensor(fitted.coef_[0], dtype=torch.float32), float(fitted.intercept_[0]))
