"""Gate policies (Residual Paving, eq. 3) and mixture policies (table 19)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from paving.backbone import PromptBatch
from paving.prompts.types import Bucket

CONFORMAL = "conformal"  # conformal:ALPHA needs a controller's calibration logits, and is made by it


class GatePolicy(Protocol):
    """logits: (n,) float32 gate logits. Returns (n,) float32 gates in [0, 1]. Only Oracle may read batch.bucket."""

    name: str
    vetoable: bool

    def gate(self, logits: Tensor, batch: PromptBatch) -> Tensor: ...


@dataclass(frozen=True)
class Soft:
    name: str = "soft"
    vetoable: bool = True

    def gate(self, logits: Tensor, batch: PromptBatch) -> Tensor:
        return torch.sigmoid(logits)


@dataclass(frozen=True)
class Hard:
    threshold: float = 0.0
    name: str = "hard"
    vetoable: bool = True

    def gate(self, logits: Tensor, batch: PromptBatch) -> Tensor:
        return (logits > self.threshold).float()


@dataclass(frozen=True)
class ThresholdedSoft:
    """Off below the threshold, graded above it: no small leak into keeps (eq. 3, gamma_thr)."""

    threshold: float = 0.0
    name: str = "thresholded"
    vetoable: bool = True

    def gate(self, logits: Tensor, batch: PromptBatch) -> Tensor:
        return torch.sigmoid(logits) * (logits > self.threshold)


@dataclass(frozen=True)
class Conformal:
    """Open where calibration's keeps would seldom score so high (controller.conformal.Reference.policy)."""

    alpha: float
    threshold: float
    calibrated: float = 0.0  # the threshold of the policies that have one, for the way back to them
    vetoable: bool = True

    @property
    def name(self) -> str:
        return f"{CONFORMAL}:{self.alpha!r}"  # to the last digit: a loaded controller makes its threshold of it

    def gate(self, logits: Tensor, batch: PromptBatch) -> Tensor:
        return (logits > self.threshold).float()


@dataclass(frozen=True)
class Closed:
    name: str = "closed"
    vetoable: bool = False

    def gate(self, logits: Tensor, batch: PromptBatch) -> Tensor:
        return torch.zeros_like(logits)


@dataclass(frozen=True)
class AlwaysOpen:
    """Every gate at 1: for tests, timings and the worst case on keeps; never a deployable rule."""

    name: str = "open"
    vetoable: bool = False

    def gate(self, logits: Tensor, batch: PromptBatch) -> Tensor:
        return torch.ones_like(logits)


@dataclass(frozen=True)
class Oracle:
    """The true label in place of the learned gate (section 3.4): tells routing errors from editing errors."""

    name: str = "oracle"
    vetoable: bool = False

    def gate(self, logits: Tensor, batch: PromptBatch) -> Tensor:
        missing = [i for i, b in zip(batch.ids, batch.bucket, strict=True) if b is None]
        if missing:
            raise ValueError(
                f"the oracle gate needs the true bucket of every prompt; {len(missing)} have none (first: {missing[0]}). "
                "Use a learned policy where labels are not known: soft, hard or thresholded."
            )
        return torch.tensor([float(b == Bucket.EDIT) for b in batch.bucket], device=logits.device)


class MixturePolicy(Protocol):
    """weights: (n, K) float32 router mixture. Returns (n, K); rows sum to 1 unless an expert was taken away."""

    def mix(self, weights: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class RouterMixture:
    def mix(self, weights: Tensor) -> Tensor:
        return weights


@dataclass(frozen=True)
class Uniform:
    def mix(self, weights: Tensor) -> Tensor:
        return torch.full_like(weights, 1.0 / weights.shape[1])


@dataclass(frozen=True)
class SingleExpert:
    expert: int = 0

    def mix(self, weights: Tensor) -> Tensor:
        _check_expert(self.expert, weights)
        alone = torch.zeros_like(weights)
        alone[:, self.expert] = 1.0
        return alone


@dataclass(frozen=True)
class WithoutExpert:
    """One expert taken away, the others as they are: their weights are not scaled up to fill the gap."""

    expert: int = 0

    def mix(self, weights: Tensor) -> Tensor:
        _check_expert(self.expert, weights)
        others = weights.clone()
        others[:, self.expert] = 0.0
        return others


def _check_expert(expert: int, weights: Tensor) -> None:
    if not 0 <= expert < weights.shape[1]:
        raise ValueError(f"expert {expert} does not exist: the controller has experts 0..{weights.shape[1] - 1}.")


def is_mixture(name: str) -> bool:
    """Whether a row's name is one that `mixture_policy` takes and not a gate policy."""
    return name in ("router", "uniform") or name.startswith(("expert:", "without:"))


POLICY_NAMES = ("soft", "hard", "thresholded", "closed", "open", "oracle")


def gate_policy(name: str, threshold: float) -> GatePolicy:
    """The policy a user named on the command line or in a saved controller.

    raises ValueError listing what is allowed.
    """
    match name:
        case "soft":
            return Soft()
        case "hard":
            return Hard(threshold)
        case "thresholded":
            return ThresholdedSoft(threshold)
        case "closed":
            return Closed()
        case "open":
            return AlwaysOpen()
        case "oracle":
            return Oracle()
    raise ValueError(f"gate policy {name!r} is not known; allowed: {', '.join(POLICY_NAMES)}.")


def mixture_policy(name: str) -> MixturePolicy:
    """`router`, `uniform`, `expert:N` (it alone) or `without:N`. raises ValueError listing what is allowed."""
    if name == "router":
        return RouterMixture()
    if name == "uniform":
        return Uniform()
    kind, _, number = name.partition(":")
    if kind == "expert" and number.isdigit():
        return SingleExpert(int(number))
    if kind == "without" and number.isdigit():
        return WithoutExpert(int(number))
    raise ValueError(f"mixture {name!r} is not known; allowed: router, uniform, expert:N, without:N.")
