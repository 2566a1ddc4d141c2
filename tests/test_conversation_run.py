"""A run whose prompts are conversations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import paving.run as runs
from paving.backbone import chat
from paving.generation import load_completions
from paving.run_folder import RunError
from tiny_runs import WordJudge, tiny_run


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("run"))


def test_conversations_are_trained_on_and_measured_whole(setting, tmp_path, monkeypatch):
    config = setting[0]
    earlier = [{"role": "user", "content": "w150 w151"}, {"role": "assistant", "content": "w152"}]
    files = {}
    for name in ("edit", "benign", "harmful"):
        rows = [json.loads(line) for line in Path(getattr(config, name)).read_text(encoding="utf-8").splitlines()]
        talks = [{"messages": [*earlier, {"role": "user", "content": row["prompt"]}]} for row in rows]
        files[name] = str(tmp_path / f"{name}.jsonl")
        Path(files[name]).write_text("\n".join(map(json.dumps, talks)) + "\n", encoding="utf-8")
    asked = []
    real = chat.render_messages
    monkeypatch.setattr(chat, "render_messages", lambda b, messages: asked.append(messages) or real(b, messages))
    runs.train(config.model_copy(update=files), tmp_path / "run", setting[1], WordJudge())
    runs.evaluate(tmp_path / "run", setting[1], judge=WordJudge())
    assert asked and all(messages[:2] == earlier and len(messages) == 3 for messages in asked)
    for answer in load_completions(tmp_path / "run" / "completions" / "learned.jsonl"):
        assert answer.prompt.startswith("User: w150 w151\n\nAssistant: w152\n\nUser: w")
    again = Path(files["harmful"]).read_text(encoding="utf-8").replace("w152", "w153")
    Path(files["harmful"]).write_text(again, encoding="utf-8")
    with pytest.raises(RunError, match="say something else now"):  # the last turns are what they were
        runs.evaluate(tmp_path / "run", setting[1], judge=WordJudge())
