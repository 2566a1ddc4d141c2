"""Completions files from anywhere: every row as it stands, and one clear line about a row that cannot be used."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paving.evaluation import json_lines
from paving.evaluation.json_lines import RowError
from paving.evaluation.judges.answers import Answer, read_answers
from paving.generation import Completion, save_completions
from paving.prompts.types import Bucket

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
# Half surrogate pairs, control characters and separators that `str.splitlines` would split at are all there.
any_text = st.text(st.characters() | st.sampled_from("\ud800\udfff\u2028\u2029\x85\x00\x0b\x1c\r\n\t[]"))
rows_of_a_file = st.lists(
    st.fixed_dictionaries(
        {"prompt": any_text.filter(str.strip), "response": any_text},
        optional={
            "id": st.none() | any_text.filter(str.strip) | st.integers(),
            "bucket": st.none() | st.sampled_from(list(Bucket)),
            "truncated": st.none() | st.booleans(),
            "gate": st.floats(allow_nan=False),
            "mixture": st.lists(st.floats(allow_nan=False), max_size=3),
        },
    ),
    min_size=1,
    max_size=6,
)


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "answers.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("answers")


@settings(deadline=None)
@given(rows=rows_of_a_file, bom=st.booleans(), end=st.sampled_from(["\n", "\r\n", "\n\n \n"]), ascii_only=st.booleans())
def test_every_row_comes_back_as_it_was_written(folder, rows, bom, end, ascii_only):
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + end for row in rows)
    path = written(folder, (b"\xef\xbb\xbf" if bom else b"") + text.encode("utf-8", "backslashreplace"))
    step = end.count("\n")
    expected = [
        Answer(
            line=1 + i * step,
            id=str(row["id"]) if row.get("id") is not None else f"line-{1 + i * step}",
            prompt=row["prompt"],
            response=row["response"],
            bucket=row.get("bucket"),
            truncated=bool(row.get("truncated")),
        )
        for i, row in enumerate(rows)
    ]
    assert list(read_answers(path)) == expected


@settings(deadline=None)
@given(st.binary(max_size=80) | rows_of_a_file.map(lambda rows: json.dumps(rows[0]).encode()[:-3] + b"\n"))
def test_whatever_a_file_holds_a_complaint_names_it(folder, content):
    path = written(folder, content)
    try:
        rows = list(read_answers(path))
    except RowError as error:
        assert re.match(rf"{re.escape(str(path))}(:\d+: | holds no completions)", str(error))
    else:
        assert rows, "an empty file is an error, not an empty list"


GOOD = '{"prompt": "p", "response": "r"}\n'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "p", "response"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('"text"', "'text' is no JSON object"),
        ('{"prompt": "p"}', "no `response`; the line has 'prompt'."),
        ('{"answer": "r", "response": "r"}', "no `prompt`; the line has 'answer', 'response'."),
        ("{}", "no `prompt`; the line has no fields."),
        ('{"prompt": ["p"], "response": "r"}', "`prompt` is ['p'], which is no string"),
        ('{"prompt": "p", "response": null}', "`response` is None, which is no string"),
        ('{"prompt": " \\n", "response": "r"}', "`prompt` is blank"),
        ('{"prompt": "p", "response": "r", "bucket": "benign"}', "`bucket` is 'benign'; allowed: edit, benign_keep, harm"),
        ('{"prompt": "p", "response": "r", "bucket": {}}', "`bucket` is {}; allowed"),
        ('{"prompt": "p", "response": "r", "truncated": "no"}', "`truncated` is 'no'; allowed: true or false"),
        ('{"prompt": "p", "response": "r", "id": 1.5}', "`id` is 1.5, which is no string"),
        ('{"prompt": "p", "response": "r", "id": true}', "`id` is True, which is no string"),
        ('{"prompt": "\ufeff", ', "not JSON"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_line(tmp_path, line, says):
    path = written(tmp_path, GOOD + "\n" + line + "\n" + GOOD)
    with pytest.raises(RowError, match=re.escape(f"{path}:3: ") + ".*" + re.escape(says)):
        list(read_answers(path))


def test_rows_before_a_bad_one_are_handed_out_first(tmp_path):
    rows = read_answers(written(tmp_path, GOOD + "{"))
    assert next(rows).prompt == "p"
    with pytest.raises(RowError):
        next(rows)


@pytest.mark.parametrize("content", [b"", b"\n \n\n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_no_empty_list(tmp_path, content):
    with pytest.raises(RowError, match=r"answers\.jsonl"):
        list(read_answers(written(tmp_path, content)))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_in_another_encoding_says_how_to_convert_it(tmp_path, encoding):
    content = GOOD.encode(encoding if encoding == "utf-16" else "ascii") + '{"prompt": "für"}\n'.encode(encoding)
    number = 1 if encoding == "utf-16" else 2
    with pytest.raises(RowError, match=rf"answers\.jsonl:{number}: not UTF-8 \(byte 0x.* iconv"):
        list(read_answers(written(tmp_path, content)))


def test_a_missing_file_and_a_folder_are_no_files(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.jsonl"):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            list(read_answers(path))


def test_a_file_without_line_ends_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "MAX_LINE_BYTES", 2**20)
    path = written(tmp_path, b'{"prompt": "' + b"x" * 2**24)
    tracemalloc.start()
    with pytest.raises(RowError, match=r"answers\.jsonl:1: longer than 1 MiB"):
        list(read_answers(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23
    path.write_text(json.dumps({"prompt": "p", "response": "x" * (2**20 - 100)}))
    assert len(next(read_answers(path)).response) == 2**20 - 100


def test_names_from_a_file_do_not_flood_a_message(tmp_path):
    row = {f"{i}\x1b[31m" + "y" * 500: 0 for i in range(400)}
    with pytest.raises(RowError) as caught:
        list(read_answers(written(tmp_path, json.dumps(row))))
    assert "and 388 more" in str(caught.value)
    assert len(str(caught.value)) < 2000 and "\x1b" not in str(caught.value)


def test_what_a_run_saves_can_be_read(tmp_path):
    saved = Completion("a", "edit", "p", "r", 3, True, 0.5, 1.0, False, (0.2, 0.8))
    save_completions([saved], tmp_path / "learned.jsonl")
    assert list(read_answers(tmp_path / "learned.jsonl")) == [Answer(1, "a", "p", "r", Bucket.EDIT, True)]


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "answers.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps({"prompt": f"p{i}", "response": "word " * 2000}) + "\n" for i in range(400))
    tracemalloc.start()
    n = sum(1 for _ in read_answers(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 400 and path.stat().st_size > 4e6
    assert peak < 5e5


@pytest.mark.parametrize("model", ["llama2new", "mistralguard"])
def test_the_human_labelled_responses_of_xstest_are_such_a_file(model):
    path = DATA / f"xstest_human_labels_{model}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here; the human labels are not part of the repository")
    rows = list(read_answers(path))
    assert len(rows) == len({r.id for r in rows}) == 450
    assert all(r.bucket is None for r in rows)
