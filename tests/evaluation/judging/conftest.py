"""Ten answers to judge, and a place for their verdicts."""

from __future__ import annotations

import pytest

from paving.prompts.types import Bucket
from tiny_judging import row, write


@pytest.fixture
def answers(tmp_path):
    return write(tmp_path / "answers.jsonl", [row(i, bucket=list(Bucket)[i % 3]) for i in range(10)])


@pytest.fixture
def out(tmp_path):
    return tmp_path / "new folder" / "verdicts.jsonl"
