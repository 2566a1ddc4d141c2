"""The protocol every method follows: enter it for one batch, run the model as usual, leave the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from paving.backbone import Backbone, PromptBatch


@dataclass(frozen=True)
class RowState:
    """What an intervention decided for one row of a batch.

    gate     effective strength in [0, 1] after the veto, before the scale; 0.0 means the row is the base's
    logit    the router's gate logit, where there is a router
    veto     True where the veto closed the gate; None where there is no veto
    mixture  expert weights, summing to 1, where there are experts
    """

    gate: float
    logit: float | None = None
    veto: bool | None = None
    mixture: tuple[float, ...] | None = None


class Applied(Protocol):
    """What entering an intervention gives: the decisions for this batch, known once the prompt has been read."""

    def rows(self) -> tuple[RowState, ...]: ...


class Intervention(Protocol):
    """A method, applied to one batch at a time.

    `apply` leaves the model bit for bit as it was. Per-row state lives in what it returns, never on a class or a
    module. Only the oracle may read `batch.bucket`.
    """

    @property
    def name(self) -> str: ...

    def apply(self, backbone: Backbone, batch: PromptBatch) -> AbstractContextManager[Applied]: ...


@dataclass(frozen=True)
class Decided:
    """Applied of a method that has decided before the first pass."""

    states: tuple[RowState, ...]

    def rows(self) -> tuple[RowState, ...]:
        return self.states


def everywhere(n: int, gate: float = 1.0) -> Decided:
    """n rows edited alike, or none of them at gate 0."""
    return Decided((RowState(gate=gate),) * n)


@dataclass(frozen=True)
class Untouched:
    """Applied of the identity: every gate closed."""

    n: int

    def rows(self) -> tuple[RowState, ...]:
        return (RowState(gate=0.0),) * self.n


@dataclass(frozen=True)
class Identity:
    """The untouched base, as an intervention."""

    name: str = "base"

    @contextmanager
    def apply(self, backbone: Backbone, batch: PromptBatch) -> Iterator[Untouched]:
        yield Untouched(len(batch))
