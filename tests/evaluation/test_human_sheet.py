"""A sample for people to label: who is in it, what it shows, and that what they wrote comes back and is never lost."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paving.evaluation import human_sheet
from paving.evaluation.agreement import agreement
from paving.evaluation.human_sheet import COLUMNS, MAX_CELL, allocate, guarded, read_csv_sheet, unguarded, write_sheet
from paving.evaluation.json_lines import RowError
from paving.evaluation.judges import Label, Verdict
from paving.evaluation.judging import judge_file
from paving.evaluation.ratings import read_ratings
from paving.evaluation.verdicts import read_verdicts
from paving.prompts.types import Bucket

any_stratum = st.tuples(st.sampled_from(list(Label)), st.sampled_from([None, *Bucket]))


class Written:
    """Labels with what the response begins with: 0 to 4."""

    name = "written-1"

    def judge(self, prompt, response, bucket, *, truncated=False):
        return Verdict(list(Label)[int(response[0])], "written")


HOSTILE = ['=HYPERLINK("http://x")', "+1", "-1", "@SUM(A1)", "\tx", "'quoted", "a,b;c\td", 'say "no"', "two\nlines\r\nend\r",
           "ü \u2028 \u202e", "\x00\x1b[31m", "[red]x[/]"]  # fmt: skip


@pytest.fixture
def judged(tmp_path):
    """60 completions: 40 refusals on edit prompts, 15 broken on benign, 4 harmful on harmful, 1 reframe without bucket."""
    kinds = [(2, "edit")] * 40 + [(1, "benign_keep")] * 15 + [(0, "harmful_keep")] * 4 + [(3, None)]
    answers, verdicts = tmp_path / "answers.jsonl", tmp_path / "verdicts.jsonl"
    with answers.open("w") as file:
        for i, (label, bucket) in enumerate(kinds):
            text = HOSTILE[i % len(HOSTILE)]
            row = {"id": f"q{i}", "prompt": f"{text} {i}", "response": f"{label}{text}{i}", "bucket": bucket}
            file.write(json.dumps(row) + "\n")
    judge_file(answers, Written(), verdicts)
    return verdicts, answers


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def strata_of(rows) -> Counter:
    return Counter((list(Label)[int(r["response"][0])], r["bucket"]) for r in rows)


def test_strata_are_taken_in_proportion_and_none_is_left_out(judged, tmp_path):
    sheet = write_sheet(*judged, 12, tmp_path / "sheet.jsonl")
    taken = {(label, bucket): n for (label, bucket), (n, _) in sheet.strata.items()}
    assert taken == {(Label.HARMLESS_REFUSAL, "edit"): 7, (Label.HARMLESS_BROKEN, "benign_keep"): 3,
                     (Label.HARMFUL, "harmful_keep"): 1, (Label.HARMLESS_REFRAME, None): 1}  # fmt: skip
    assert strata_of(rows_of(sheet.jsonl)) == taken and sheet.n == 12
    assert sum(size for _, size in sheet.strata.values()) == 60


def test_the_sheet_shows_texts_whole_and_no_label(judged, tmp_path):
    sheet = write_sheet(*judged, 60, tmp_path / "sheet.jsonl")
    answers = {r["id"]: r for r in rows_of(judged[1])}
    rows = rows_of(sheet.jsonl)
    assert len(rows) == 60 and all(tuple(r) == COLUMNS for r in rows)
    for r in rows:
        original = answers[r["id"]]
        assert (r["prompt"], r["response"], r["bucket"]) == (original["prompt"], original["response"], original["bucket"])
        assert r["human_label"] == ""
    assert not {label.value for label in Label} & {str(v) for r in rows for v in r.values()}
    cells = csv.reader(io.StringIO(sheet.csv.read_bytes().decode("utf-8-sig"), newline=""))
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for row in cells for cell in row)
    assert [r["id"] for r in rows] != list(answers), "rows in the order of the strata would give the labels away"


def test_the_same_seed_gives_the_same_sheet_and_another_seed_another(judged, tmp_path):
    sheets = [write_sheet(*judged, 12, tmp_path / f"{i}.jsonl", seed=seed) for i, seed in enumerate((5, 5, 6))]
    texts = [s.jsonl.read_bytes() + s.csv.read_bytes() for s in sheets]
    assert texts[0] == texts[1] != texts[2]


@settings(deadline=None)
@given(st.dictionaries(any_stratum, st.integers(1, 500), min_size=1), st.integers(1, 2000))
@example({(Label.HARMFUL, None): 499, **{(Label.HARMFUL, b): 1 for b in Bucket}}, 4)
def test_an_allocation_is_whole_within_its_strata_and_near_proportion(sizes, n):
    taken = allocate(sizes, n)
    total = sum(sizes.values())
    n = min(n, total)
    assert taken.keys() == sizes.keys() and sum(taken.values()) == n
    assert all(0 <= taken[s] <= sizes[s] for s in sizes)
    if n >= len(sizes):
        assert min(taken.values()) >= 1
    raised = sum(n * size / total < 1 for size in sizes.values())  # what these get beyond their share, others lack
    for s, size in sizes.items():
        assert abs(taken[s] - n * size / total) < 1 + raised


def test_every_row_of_a_stratum_can_be_drawn(judged, tmp_path):
    seen = {
        r["id"] for seed in range(40) for r in rows_of(write_sheet(*judged, 12, tmp_path / f"{seed}.jsonl", seed=seed).jsonl)
    }
    assert len(seen) == 60


# --- the spreadsheet's side -----------------------------------------------------------------------------------------


def fill_csv(path, label_of, *, delimiter=",", encoding="utf-8-sig"):
    """What a spreadsheet does: read the file, write the labels, save it the way the locale has it."""
    rows = list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))
    for row in rows[1:]:
        row[COLUMNS.index("human_label")] = label_of(unguarded(row[0]))
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_labels_come_back_from_either_file_and_meet_the_verdicts(judged, tmp_path, delimiter):
    sheet = write_sheet(*judged, 20, tmp_path / "sheet.jsonl")
    labels = {line.id: line.label for line in read_verdicts(judged[0])}
    wrong = rows_of(sheet.jsonl)[3]["id"]
    other = {**labels, wrong: Label.HARMLESS_BENIGN}
    fill_csv(sheet.csv, lambda i: other[i].value.lower(), delimiter=delimiter)
    sheet.jsonl.write_text("".join(json.dumps({**r, "human_label": other[r["id"]]}) + "\n" for r in rows_of(sheet.jsonl)))
    for path in (sheet.csv, sheet.jsonl):
        found = agreement(read_ratings(judged[0]), read_ratings(path))
        assert (found.n, found.only_a, found.labels.agreement.k) == (20, 40, 19)
        assert [d.id for d in found.disagreements] == [wrong]


def test_rows_whose_id_a_spreadsheet_changed_are_matched_by_their_text(judged, tmp_path):
    sheet = write_sheet(*judged, 20, tmp_path / "sheet.jsonl")
    fill_csv(sheet.csv, lambda _: "HARMFUL")
    content = sheet.csv.read_text(encoding="utf-8").replace("\nq", "\n0")
    sheet.csv.write_text(content, encoding="utf-8", newline="")
    found = agreement(read_ratings(judged[0]), read_ratings(sheet.csv))
    assert (found.n, found.by_id, found.by_text) == (20, 0, 20)


@settings(deadline=None)
@given(st.text())
def test_no_cell_begins_like_a_formula_and_each_comes_back(cell):
    assert not guarded(cell).startswith(("=", "+", "-", "@", "\t", "\r"))
    assert unguarded(guarded(cell)) == cell


@settings(max_examples=50, deadline=None)
@given(
    ident=st.text(min_size=1).filter(lambda s: s.strip()), prompt=st.text(), response=st.text(max_size=200),
    label=st.sampled_from(["", *Label]),
)  # fmt: skip
def test_whatever_the_texts_hold_the_csv_reads_back(tmp_path_factory, ident, prompt, response, label):
    path = tmp_path_factory.mktemp("csv") / "sheet.csv"
    row = dict(zip(COLUMNS, (ident, Bucket.EDIT, False, prompt, response, label, "hash"), strict=True))
    path.write_text(human_sheet._as_csv([row, row]), encoding="utf-8", newline="")
    lines = list(read_csv_sheet(path))
    assert len(lines) == 2
    for line in lines:
        assert line.cells == {"id": ident, "bucket": "edit", "human_label": label or None, "text_sha256": "hash"}


def test_a_text_too_long_for_a_spreadsheet_is_cut_there_only(tmp_path):
    answers, verdicts = tmp_path / "a.jsonl", tmp_path / "v.jsonl"
    answers.write_text(json.dumps({"prompt": "p", "response": "1" + "x" * 200_000}) + "\n")
    judge_file(answers, Written(), verdicts)
    sheet = write_sheet(verdicts, answers, 1, tmp_path / "sheet.jsonl")
    assert len(rows_of(sheet.jsonl)[0]["response"]) == 200_001
    assert MAX_CELL < len(sheet.csv.read_text(encoding="utf-8")) < MAX_CELL + 500
    fill_csv(sheet.csv, lambda _: "HARMLESS-BROKEN")
    assert agreement(read_ratings(verdicts), read_ratings(sheet.csv)).labels.agreement.k == 1


def test_half_a_surrogate_pair_does_not_stop_a_sheet(tmp_path):
    answers, verdicts = tmp_path / "a.jsonl", tmp_path / "v.jsonl"
    answers.write_text('{"prompt": "p", "response": "1 \\ud800"}\n')
    judge_file(answers, Written(), verdicts)
    sheet = write_sheet(verdicts, answers, 1, tmp_path / "sheet.jsonl")
    assert rows_of(sheet.jsonl)[0]["response"] == "1 \ud800"


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", ["sheet.jsonl", "sheet.csv"])
def test_an_existing_sheet_is_never_overwritten(judged, tmp_path, there):
    (tmp_path / there).write_text("two hours of labels")
    with pytest.raises(FileExistsError, match=f"{there} exists already and may hold labels"):
        write_sheet(*judged, 5, tmp_path / "sheet.jsonl")
    assert (tmp_path / there).read_text() == "two hours of labels"
    assert len([p for p in tmp_path.iterdir() if p.name.startswith("sheet")]) == 1


@pytest.mark.parametrize(("n", "name", "says"), [(0, "s.jsonl", "a sample of 0"), (5, "s.csv", "must end in .jsonl")])
def test_a_sample_that_cannot_be_is_refused(judged, tmp_path, n, name, says):
    with pytest.raises(ValueError, match=says):
        write_sheet(*judged, n, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_completions_that_were_not_judged_are_refused(judged, tmp_path):
    verdicts, answers = judged
    answers.write_text(answers.read_text().replace('"response": "', '"response": "1'))
    with pytest.raises(ValueError, match=r"verdicts\.jsonl judges a completion 'q\d+' that .*answers\.jsonl does not hold"):
        write_sheet(verdicts, answers, 5, tmp_path / "sheet.jsonl")
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(RowError, match="holds no verdicts"):
        write_sheet(tmp_path / "none.jsonl", answers, 5, tmp_path / "sheet.jsonl")
    assert not (tmp_path / "sheet.jsonl").exists()


HEAD = "id,human_label,text_sha256\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (HEAD + "q,maybe,h\n", r"sheet\.csv:2: `human_label` is 'maybe'; allowed: HARMFUL, HARMLESS-BROKEN"),
        (HEAD + 'q,HARMFUL,"a\nb"\nr,no,h\n', r"sheet\.csv:4: `human_label` is 'no'"),
        (HEAD + "q,HARMFUL\n", r"sheet\.csv:2: 2 cells where the header has 3"),
        (HEAD + 'q,"HARMFUL\n', r"sheet\.csv:2: not CSV"),
        ("id,label\nq,HARMFUL\n", r"sheet\.csv:1: no 'human_label', 'text_sha256' in the header \('id', 'label'\)"),
        (HEAD, r"no row has a `human_label` yet \(0 are empty\)"),
        (HEAD + "q,,h\n\n,,\n", r"no row has a `human_label` yet \(1 are empty\)"),
        ("", "no row has"),
        (HEAD.encode() + b"\xe4,HARMFUL,h\n", r"sheet\.csv: not UTF-8 at byte 27. Save the sheet as CSV UTF-8"),
    ],
)
def test_a_sheet_that_cannot_be_read_says_where(tmp_path, content, says):
    path = tmp_path / "sheet.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RowError, match=says):
        read_ratings(path)
