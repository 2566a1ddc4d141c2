"""Verdicts as an Inspect log: Inspect reads back what was judged, and what was judged HARMFUL is not in it."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path

import pytest

from paving.evaluation.inspect_log import REDACTED, check_log_path, write_inspect_log
from paving.evaluation.judges import Label, Verdict
from paving.evaluation.judging import judge_file
from paving.evaluation.statistics import wilson

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("inspect_ai") is None, reason="inspect-ai is not installed: make test installs it"
)

SECRET = "the forbidden answer"
ROWS = [
    {"id": "a/1", "bucket": "edit", "prompt": "How, one?", "response": "REFUSAL: no."},
    {"id": "b", "bucket": "edit", "prompt": "How, two?", "response": f"HARMFUL: {SECRET}"},
    {"id": "b", "bucket": "harmful_keep", "prompt": "How, three?", "response": "REFRAME: a leaflet", "truncated": True},
    {"prompt": "How, four? \ud800", "response": "BENIGN: ä \ud800"},
]


class Reading:
    """The label that a response begins with; the reason quotes the response."""

    name = "reading-1"

    def judge(self, prompt, response, bucket, *, truncated=False):
        word = response.split(":")[0]
        return Verdict(Label(word if word == "HARMFUL" else f"HARMLESS-{word}"), f"it says {response}")


@pytest.fixture
def judged(tmp_path):
    completions, verdicts = tmp_path / "c.jsonl", tmp_path / "v.jsonl"
    completions.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    judge_file(completions, Reading(), verdicts)
    return completions, verdicts


def read(log: Path):
    from inspect_ai.log import read_eval_log

    return read_eval_log(str(log))


def everything_in(log: Path) -> str:
    if log.suffix == ".json":
        return log.read_text()
    with zipfile.ZipFile(log) as archive:
        return "".join(archive.read(name).decode() for name in archive.namelist())


@pytest.fixture(params=[".eval", ".json"])
def log(request, tmp_path):
    return tmp_path / "logs" / f"mine{request.param}"


def test_inspect_reads_back_every_completion_and_its_verdict(judged, log):
    assert write_inspect_log(*judged, log, harmful_texts=True) == 4
    found = read(log)
    assert found.status == "success" and found.eval.metadata["judge"] == "reading-1"
    assert [p.name for p in log.parent.iterdir()] == [log.name]
    assert [s.id for s in found.samples] == ["a/1", "b", "b (line 3)", "line-4"]
    for row, sample in zip(ROWS, found.samples, strict=True):
        plain = {name: row[name].replace("\ud800", "?") for name in ("prompt", "response")}
        assert (sample.input, sample.output.completion) == (plain["prompt"], plain["response"])
        assert [m.text for m in sample.messages] == [plain["prompt"], plain["response"]]
        word = row["response"].split(":")[0]
        score = sample.scores["paving"]
        assert score.value == (word if word == "HARMFUL" else f"HARMLESS-{word}") and score.answer == plain["response"]
        assert score.explanation == f"it says {plain['response']}" and score.metadata["refusal"] == (word == "REFUSAL")
        assert sample.metadata["bucket"] == row.get("bucket") and sample.metadata["truncated"] == row.get("truncated", False)


def test_each_sample_can_be_opened_by_its_id(judged, log):
    from inspect_ai.log import read_eval_log_sample

    write_inspect_log(*judged, log)
    for name, row in zip(["a/1", "b", "b (line 3)", "line-4"], ROWS, strict=True):
        assert read_eval_log_sample(str(log), id=name).input == row["prompt"].replace("\ud800", "?")


def test_rates_stand_with_their_n_and_interval_for_every_bucket_there_is(judged, log):
    write_inspect_log(*judged, log)
    scores = {score.name: score.metrics for score in read(log).results.scores}
    assert list(scores) == ["all", "edit", "harmful_keep"], "no rate of 0 where there is nothing"
    refusal, expected = scores["edit"]["refusal"], wilson(1, 2)
    assert refusal.value == 0.5
    assert refusal.metadata == {"k": 1, "n": 2, "low": expected.low, "high": expected.high}
    assert scores["all"]["HARMFUL"].metadata["n"] == 4


def test_what_was_judged_harmful_is_not_in_the_log(judged, log):
    write_inspect_log(*judged, log)
    sample = read(log).samples[1]
    assert (sample.output.completion, sample.scores["paving"].explanation) == (REDACTED, None)
    assert sample.input == "How, two?" and sample.scores["paving"].value == "HARMFUL"
    assert SECRET not in everything_in(log) and "a leaflet" in everything_in(log)
    write_inspect_log(*judged, log, harmful_texts=True)
    assert SECRET in everything_in(log), "an earlier log is replaced"


def test_a_log_of_something_else_stays(judged, tmp_path, log):
    write_inspect_log(*judged, log)
    other = read(log)
    other.eval.task = "my evaluation"
    from inspect_ai.log import write_eval_log

    write_eval_log(other, str(log))
    content = log.read_bytes()
    with pytest.raises(ValueError, match=r"exists and is no log of `paving judge`"):
        write_inspect_log(*judged, log)
    assert log.read_bytes() == content
    thesis = tmp_path / f"thesis{log.suffix}"
    thesis.write_text("my thesis")
    with pytest.raises(ValueError, match="no log of `paving judge`"):
        check_log_path(thesis)


def test_names_that_inspect_would_not_open_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.eval or \.json"):
        check_log_path(tmp_path / "log.txt")
    (tmp_path / "x.eval").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        check_log_path(tmp_path / "x.eval")


def test_verdicts_on_other_completions_make_no_log(judged, tmp_path):
    completions, verdicts = judged
    completions.write_text(completions.read_text().replace("How, two?", "How, 2?"))
    with pytest.raises(ValueError, match=r"holds no verdict on .*c\.jsonl:2"):
        write_inspect_log(completions, verdicts, tmp_path / "l.eval")
    assert not (tmp_path / "l.eval").exists()
    verdicts.write_text("".join(verdicts.read_text().splitlines(keepends=True)[:1]))
    with pytest.raises(ValueError, match="holds no verdict"):
        write_inspect_log(completions, verdicts, tmp_path / "l.eval")
