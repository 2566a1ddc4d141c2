from __future__ import annotations

import pytest

from paving import run as runs
from tiny_runs import WordJudge, tiny_run


@pytest.fixture(scope="session")
def setting(tmp_path_factory):
    """(configuration, means) of a tiny run."""
    return tiny_run(tmp_path_factory.mktemp("compared"))


@pytest.fixture(scope="session")
def evaluated(setting, tmp_path_factory):
    """The folder of an evaluated tiny run, to be copied by whoever writes into it."""
    config, means = setting
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    runs.train(config, folder, means, WordJudge())
    runs.evaluate(folder, means, judge=WordJudge())
    return folder
