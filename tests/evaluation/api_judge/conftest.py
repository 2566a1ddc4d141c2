"""A tiny model behind a real endpoint, and the judge that asks it."""

from __future__ import annotations

import pytest

from paving.evaluation.judges.api import ApiJudge
from tiny_endpoint import Endpoint, serving
from tiny_judges import judge_backbone
from tiny_rows import LOCAL


@pytest.fixture(scope="module")
def backbone():
    return judge_backbone()


@pytest.fixture
def endpoint(backbone):
    with serving(Endpoint(backbone)) as running:
        yield running


@pytest.fixture
def judge(endpoint) -> ApiJudge:
    return ApiJudge(LOCAL, base_url=endpoint.url, timeout=20, retries=2)


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "LOCAL_API_KEY", "LOCAL_BASE_URL", "INSPECT_EVAL_MODEL_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def waited(monkeypatch) -> list[float]:
    """Inspect's pauses between retries, in seconds, noted instead of waited for."""
    pauses: list[float] = []

    async def noted(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("inspect_ai.model._retry._sleep", noted)
    return pauses
