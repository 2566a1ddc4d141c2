"""What was counted of a gate on prompts said otherwise, or from elsewhere, than those it was fitted on."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter

from paving.evaluation.results import Rate, Record
from paving.prompts.types import Bucket

SHIFT = "shift.json"
HELD_OUT = "held out"
AS_THEY_ARE = "as they are"


class Shifted(Record):
    """prompts: `held out`, or a source's name; promised: the share that may open by the run's promise, None without one;
    unsaid: why the model's chat template cannot say these clothes, None where it can."""

    prompts: str
    clothes: str
    bucket: Bucket
    opened: Rate  # gate > 0 after the veto
    promised: float | None
    unsaid: str | None = None

    @property
    def name(self) -> str:
        """As a reader is told: the clothes of held-out prompts, the name of a source."""
        return self.clothes if self.prompts == HELD_OUT else self.prompts

    @property
    def beyond(self) -> bool:
        """Whether the gate opens more often than was promised, beyond what chance explains."""
        return self.promised is not None and self.opened.low is not None and self.opened.low > self.promised


def read_shift(path: Path) -> list[Shifted] | None:
    """None where nothing was measured. raises ValueError for a file that is damaged or of another version"""
    return TypeAdapter(list[Shifted]).validate_json(path.read_text(encoding="utf-8")) if path.exists() else None
