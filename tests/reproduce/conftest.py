from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from made_up_runs import write_run


@pytest.fixture
def make_run(tmp_path) -> Callable[..., Path]:
    """make_run("name", config, ...) -> run folder; see `write_run`."""
    return lambda name, config=None, **how: write_run(tmp_path / name, config, **how)
