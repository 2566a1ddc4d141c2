"""One tiny base, its traces and one uninterrupted fit, for every module of this folder that asks."""

from __future__ import annotations

import pytest

from tiny_fits import fitted, prepared
from tiny_models import tiny_backbone


@pytest.fixture(scope="module")
def base():
    return tiny_backbone("llama")


@pytest.fixture(scope="module")
def ready(base, tmp_path_factory):
    return prepared(base, tmp_path_factory.mktemp("traces"))


@pytest.fixture(scope="module")
def whole(base, ready, tmp_path_factory):
    """One uninterrupted fit: (controller, records, folder)."""
    folder = tmp_path_factory.mktemp("whole")
    return *fitted(base, ready, folder), folder
