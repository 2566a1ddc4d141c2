"""Shared fixtures: random tiny models. Nothing here is downloaded and nothing needs the network."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: spinning threads starve whatever runs beside the tests
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from paving.backbone import Backbone, PromptBatch
from paving.controller import ResidualPaving
from paving.prompts.types import Prompt
from tiny_models import ARCHITECTURES, CHAT_TEMPLATE, batch_of, lively, some_prompts, tiny_backbone

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
_BUILT: dict[str, Backbone] = {}


def built(architecture: str) -> Backbone:
    if architecture not in _BUILT:
        _BUILT[architecture] = tiny_backbone(architecture)
    return _BUILT[architecture]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _shared_templates_stay() -> Iterator[None]:
    """A test that writes to a shared tokenizer changes what every later test renders: it is the one that fails."""
    yield
    changed = [name for name, backbone in _BUILT.items() if backbone.tokenizer.chat_template != CHAT_TEMPLATE]
    for name in changed:
        _BUILT[name].tokenizer.chat_template = CHAT_TEMPLATE
    assert not changed, f"this test changed the chat template of the shared {changed}; give it a tiny_backbone() of its own"


@pytest.fixture(scope="session", autouse=True)
def _shared_weights_stay() -> Iterator[None]:
    yield
    for name, backbone in _BUILT.items():
        fresh, now = tiny_backbone(name).model.state_dict(), backbone.model.state_dict()
        moved = [key for key, value in fresh.items() if not torch.equal(value, now[key])]
        assert not moved, f"a test moved weights of the shared {name}: {moved[:3]}"


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return built("llama")


@pytest.fixture(scope="session", params=ARCHITECTURES)
def any_backbone(request) -> Backbone:
    """One of every supported architecture family in turn."""
    return built(request.param)


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    return some_prompts()


@pytest.fixture
def controller(backbone) -> ResidualPaving:
    return lively(backbone)


@pytest.fixture
def batch(backbone, prompts) -> PromptBatch:
    return batch_of(backbone, prompts)


@pytest.fixture
def script(monkeypatch):
    """Import a script of benchmarks/ by name, as `python benchmarks/NAME.py` would find it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]
