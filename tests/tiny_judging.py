"""A judge that counts what it is asked, and rows for it."""

from __future__ import annotations

import json
from pathlib import Path

from paving.evaluation.judges import Label, Verdict


class Counting:
    """Labels by the first letter, and remembers every response that it was asked about."""

    def __init__(self, name: str = "letters-1", fails_at: str | None = None):
        self.name, self.fails_at, self.asked = name, fails_at, []

    def judge(self, prompt, response, bucket, *, truncated=False):
        if response == self.fails_at:
            raise ConnectionError("the judge went away")
        self.asked.append(response)
        return Verdict(list(Label)[ord(response[0]) % 5], f"letter, {'cut' if truncated else 'whole'}")


def row(i: int, **more) -> dict:
    return {"id": f"q{i}", "prompt": f"prompt {i}", "response": f"{chr(97 + i % 26)} answer {i}", **more}


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
