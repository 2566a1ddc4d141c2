"""What a request's user, and the metrics, are told of its gate: plain numbers, for they cross processes as JSON does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

FIELD = "paving"  # in an answer, and on the way to it


@dataclass(frozen=True)
class Told:
    """One request's decision.

    policy    the one it was decided by, `hard` for a controller whose calibrated gate that is
    logit     None where nothing was decided: the gate was asked to be closed, or `failed`
    veto      None where the veto was not asked
    boundary  how far the prompt's boundary feature lies from those the router was fitted on (ControllerWeights.unlikeness)
    failed    the gate could not be decided, and stayed closed
    """

    policy: str
    gate: float
    logit: float | None = None
    veto: bool | None = None
    mixture: tuple[float, ...] | None = None
    boundary: float | None = None
    failed: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def as_told(fields: Mapping[str, Any]) -> Told:
    mixture = fields["mixture"]
    return Told(**{**fields, "mixture": None if mixture is None else tuple(mixture)})
