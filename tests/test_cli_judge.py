"""`paving judge`, `agree` and `sample`: what they print, what they never print, and refusals in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from command_line import printed, refused
from paving.evaluation import judges
from paving.evaluation.judges import Label, RuleJudge, Verdict
from paving.evaluation.judging import judge_file
from paving.terminal import plain

REFUSAL = "I'm sorry, but I can't help with that."
HOSTILE = "[bold red]boo[/] [link=http://x]y[/link] \x1b[31mred\x07 \u202eevil\u200b :smile: \r\n\x00"


@pytest.fixture(autouse=True)
def _wide_enough(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def answers(tmp_path):
    rows = [{"id": f"e{i}", "bucket": "edit", "prompt": f"How, {i}?", "response": REFUSAL if i < 3 else f"Like this: {i}."}
            for i in range(4)]  # fmt: skip
    rows += [{"id": f"h{i}", "bucket": "harmful_keep", "prompt": f"Make it {i}", "response": REFUSAL} for i in range(2)]
    return write(tmp_path / "answers.jsonl", *rows)


# --- judge ----------------------------------------------------------------------------------------------------------


def test_judging_prints_counts_and_rates_by_bucket(answers, tmp_path):
    text = printed("judge", answers, "--out", tmp_path / "v.jsonl")
    assert "judge rules-2" in text
    assert re.search(r"edit +4 +0 +0 +3 +0 +1 +3/4 75\.0", text), text
    assert re.search(r"benign keep +0 +n/a +n/a +n/a +n/a +n/a +n/a \(n=0\)", text)
    assert re.search(r"harmful keep +2 +0 +0 +2 +0 +0 +2/2 100\.0 *\n +\[34\.2, 100\.0\]", text)
    assert re.search(r"all +6 ", text) and "none" not in text
    assert f"verdicts: {tmp_path / 'v.jsonl'} (6 judged now, 0 known before)" in text
    assert "(0 judged now, 6 known before)" in printed("judge", answers, "--out", tmp_path / "v.jsonl")


def test_judging_as_json_is_json_and_nothing_else(answers, tmp_path):
    found = json.loads(printed("judge", answers, "--out", tmp_path / "v.jsonl", "--json"))
    assert (found["judge"], found["n"], found["asked"]) == ("rules-2", 6, 6)
    assert found["verdicts"] == str(tmp_path / "v.jsonl")
    edit, benign = found["buckets"][:2]
    assert edit["labels"]["HARMLESS-REFUSAL"] == edit["refusal"]["k"] == 3
    assert benign["refusal"] == {"k": 0, "n": 0, "rate": None, "low": None, "high": None}


def test_an_unknown_judge_is_refused_with_what_is_allowed(answers, tmp_path):
    assert "the judge 'oracle' is not known; allowed: rules, rules:edit=harmful, hf:rubric=MODEL" in refused(
        "judge", answers, "--out", tmp_path / "v.jsonl", "--judge", "oracle"
    )
    assert not (tmp_path / "v.jsonl").exists()


def test_a_bad_row_is_one_line_with_file_and_number(answers, tmp_path):
    answers.write_text(answers.read_text() + '{"prompt": "p"}\n')
    assert "answers.jsonl:7: no `response`; the line has 'prompt'." in refused("judge", answers, "--out", tmp_path / "v")
    assert "there is no file" in refused("judge", tmp_path / "nowhere", "--out", tmp_path / "v")
    assert not (tmp_path / "v").exists()


def test_a_judge_that_fails_says_that_what_it_judged_is_kept(answers, tmp_path, monkeypatch):
    class Failing(RuleJudge):
        def judge(self, prompt, *shown, **more):
            if prompt == "How, 3?":
                raise ConnectionError("the judge [went] away")
            return super().judge(prompt, *shown, **more)

    with monkeypatch.context() as patched:
        patched.setattr(judges, "judge_from", lambda _line, **_loading: Failing())
        line = refused("judge", answers, "--out", tmp_path / "v.jsonl")
    assert "the judge [went] away" in line
    assert f"{answers}:4" in line and "kept in" in line and "the same command goes on from there" in line
    assert "(3 judged now, 3 known before)" in printed("judge", answers, "--out", tmp_path / "v.jsonl")


def test_verdicts_that_stay_aside_are_mentioned(answers, tmp_path):
    printed("judge", answers, "--out", tmp_path / "old.jsonl")
    answers.write_text(answers.read_text().replace("How, 3?", "How, 33?"))
    assert "Give another --out" in refused("judge", answers, "--out", tmp_path / "old.jsonl")
    (tmp_path / "new.jsonl.partial").write_bytes((tmp_path / "old.jsonl").read_bytes())
    text = printed("judge", answers, "--out", tmp_path / "new.jsonl")
    assert "(1 judged now, 5 known before)" in text and "kept aside: 1 verdicts on other completions" in text


# --- agree ----------------------------------------------------------------------------------------------------------


class Other:
    """Calls everything on harmful prompts HARMFUL, with a reason that quotes the answer."""

    name = "[blink]other-1"

    def judge(self, prompt, response, bucket, *, truncated=False):
        if bucket == "harmful_keep":
            return Verdict(Label.HARMFUL, f"it says: {response}")
        return RuleJudge().judge(prompt, response, bucket, truncated=truncated)


@pytest.fixture
def two(answers, tmp_path):
    write_more = json.dumps({"id": "[i]x", "bucket": "edit", "prompt": HOSTILE, "response": "Sure." + HOSTILE * 200}) + "\n"
    answers.write_text(answers.read_text() + write_more)
    judge_file(answers, RuleJudge(), tmp_path / "a.jsonl")
    judge_file(answers, Other(), tmp_path / "b.jsonl")
    human = [{**json.loads(line), "human_label": "HARMLESS-REFRAME"} for line in answers.read_text().splitlines()]
    write(tmp_path / "human.jsonl", *human)
    return tmp_path / "a.jsonl", tmp_path / "b.jsonl"


def test_agreement_prints_figures_and_the_confusion(two):
    text = printed("agree", *two)
    assert "A: rules-2 (" in text and "B: [blink]other-1 (" in text
    assert "7 completions rated by both (7 matched by id, 0 by text); only in A: 0, only in B: 0" in text
    assert re.search(r"five labels +5/7 71\.4 ", text) and re.search(r"refusal or not +5/7 71\.4 ", text)
    assert re.search(r"refusal +2 +0 +3 +0 +0", text), text
    assert "disagreements: 2 (--show 10 lists ten of them)" in text and REFUSAL not in text


def test_a_binary_side_leaves_the_five_labels_missing(answers, two, tmp_path):
    rows = [{**json.loads(line), "human_label": "2_full_refusal"} for line in answers.read_text().splitlines()]
    text = printed("agree", two[0], write(tmp_path / "binary.jsonl", *rows))
    assert re.search(r"five labels +n/a +n/a +n/a", text)
    assert re.search(r"refused +5 +0", text) and re.search(r"complied +2 +0", text)


def test_what_either_side_called_harmful_is_redacted(answers, two):
    text = printed("agree", *two, "--show", "9", "--completions", answers)
    assert text.count("[redacted: called HARMFUL by one side") == 2
    assert REFUSAL not in text and "it says" not in text
    assert "prompt:   Make it 1" in text
    back = printed("agree", *two[::-1], "--show", "1", "--completions", answers)
    assert back.count("[redacted") == 1 and REFUSAL not in back and "disagreements: 1 of 2" in back


def test_texts_from_a_file_are_shown_as_text_and_cut(two, tmp_path):
    text = printed("agree", two[0], tmp_path / "human.jsonl", "--show", "9")
    assert "[7] [i]x, bucket edit" in text and "[bold red]boo[/] [link=http://x]y[/link]" in text and ":smile:" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e\u200b]", text), "no control and no direction characters"
    assert re.search(r"\[\d{4,} more characters\]", text)
    assert max(map(len, text.splitlines())) < 700


def test_without_completions_the_texts_are_missing_and_it_says_so(two):
    assert printed("agree", *two, "--show", "2").count("text: n/a (give --completions") == 2


def test_agreement_as_json_holds_every_figure_and_no_text(answers, two, tmp_path):
    found = json.loads(printed("agree", *two, "--json", "--show", "3", "--completions", answers))
    assert found["labels"]["agreement"]["k"] == 5 and len(found["labels"]["confusion"]) == 5
    assert [d["id"] for d in found["disagreements"]] == ["h0", "h1"] and found["disagreements"][0]["harmful"]
    assert "Make it" not in json.dumps(found)
    same = json.loads(printed("agree", two[0], two[0], "--json"))
    assert same["labels"]["kappa"] == {"value": 1.0, "low": None, "high": None, "n": 7}
    assert "disagreements: 0\n" in printed("agree", two[0], two[0], "--show", "3")


def test_files_that_cannot_be_compared_are_one_line(answers, two, tmp_path):
    assert "neither a verdict (`judge` and `label`) nor a human label" in refused("agree", two[0], answers)
    other = write(tmp_path / "o.jsonl", {"id": "z", "judge": "j", "label": "HARMFUL"})
    assert "rate no completion in common" in refused("agree", two[0], other)


# --- sample ---------------------------------------------------------------------------------------------------------


def test_a_sample_is_labelled_and_compared(answers, tmp_path):
    printed("judge", answers, "--out", tmp_path / "v.jsonl")
    sheet = tmp_path / "sheet.jsonl"
    text = printed("sample", tmp_path / "v.jsonl", answers, "--n", 4, "--out", sheet)
    assert re.search(r"HARMLESS-REFUSAL +edit +2 +3", text) and "(4 completions)" in text
    assert sheet.with_suffix(".csv").exists()
    assert "no row has a `human_label` yet" in refused("agree", tmp_path / "v.jsonl", sheet)
    rows = [json.loads(line) for line in sheet.read_text().splitlines()]
    write(sheet, *({**r, "human_label": "HARMLESS-REFUSAL"} for r in rows[:3]), rows[3])
    text = printed("agree", tmp_path / "v.jsonl", sheet)
    assert "3 completions rated by both" in text and "human labels still empty: 1" in text
    assert "may hold labels" in refused("sample", tmp_path / "v.jsonl", answers, "--out", sheet)
    found = json.loads(printed("sample", tmp_path / "v.jsonl", answers, "--out", tmp_path / "s.jsonl", "--json"))
    assert found["n"] == 6 and sum(s["taken"] for s in found["strata"]) == 6


def test_a_shown_text_is_one_line_and_bounded():
    assert plain("a\nb\tc\x1b\u202e\ud800", 99) == "a b c���"
    assert plain("x" * 700, 600) == "x" * 600 + " [100 more characters]"
