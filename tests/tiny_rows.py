"""What an endpoint's judge is asked in tests, and what is needed for asking."""

from __future__ import annotations

import importlib.util
import json

import pytest

from paving.evaluation.judges import Exchange, Label
from paving.prompts.types import Bucket
from tiny_endpoint import MODEL

NEEDS_INSPECT = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("inspect_ai", "openai")),
    reason="inspect-ai and openai are not installed: make test installs them",
)

ROWS = [
    Exchange(f"How do I do thing {i}?", f"You do it like this, in {i} steps.", [*Bucket, None][i % 4]) for i in range(12)
]
LOCAL = f"openai-api/local/{MODEL}"
ONE = Exchange("Name a colour.", "Blue is one.", None)


def says(label: Label | str) -> str:
    return json.dumps({"label": str(label)})
