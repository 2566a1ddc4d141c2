"""Reading prompts: what comes in is what stood there, and what cannot be used is named by file and line."""

import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paving.prompts import Bucket, Columns, PromptError, read_prompts

some_text = st.text(min_size=1, max_size=30).filter(str.strip)
optional_text = st.none() | some_text
rows_of_a_file = st.lists(
    st.fixed_dictionaries(
        {"id": some_text, "prompt": some_text, "focus": optional_text, "target": optional_text, "source": optional_text}
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda row: row["id"],
)


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes, name: str = "mine.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def read_back(rows, path):
    def group(row):  # a word is one group however it is cased and spaced
        return " ".join(row["focus"].split()).casefold() if row["focus"] else row["id"]

    prompts = read_prompts(path, Bucket.EDIT)
    return [(p.id, p.text, p.group, p.target, p.source) for p in prompts] == [
        (r["id"], r["prompt"], group(r), r["target"] or None, r["source"] or None) for r in rows
    ]


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_a_file, bom=st.booleans(), ascii_only=st.booleans())
def test_jsonl_comes_back_as_it_was_written(tmp_path_factory, rows, bom, ascii_only):
    path = tmp_path_factory.mktemp("round") / "rows.jsonl"
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    path.write_text(lines, encoding="utf-8-sig" if bom else "utf-8", newline="")
    assert read_back(rows, path)


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_a_file, bom=st.booleans())
def test_csv_comes_back_as_it_was_written(tmp_path_factory, rows, bom):
    path = tmp_path_factory.mktemp("round") / "rows.csv"
    with path.open("w", encoding="utf-8-sig" if bom else "utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert read_back(rows, path)


def test_a_row_without_an_id_is_numbered_and_its_own_group(write):
    path = write('{"prompt": "one"}\n\n{"prompt": "two", "focus": " "}\n{"id": 7, "prompt": "three", "group": "g"}\n')
    prompts = read_prompts(path, Bucket.BENIGN_KEEP)
    assert [(p.id, p.group) for p in prompts] == [("mine-1", "mine-1"), ("mine-2", "mine-2"), ("mine-7", "g")]
    assert {p.bucket for p in prompts} == {Bucket.BENIGN_KEEP}


def test_row_numbers_do_not_depend_on_the_filter(write):
    path = write('{"prompt": "one", "label": "a"}\n{"prompt": "two", "label": "b"}\n')
    assert [p.id for p in read_prompts(f"{path}?label=b", Bucket.EDIT)] == ["mine-2"]


@pytest.mark.parametrize("column", ["text", "instruction", "question", "goal"])
def test_other_names_of_the_prompt_column_are_known(write, column):
    assert read_prompts(write(json.dumps({column: "hello"})), Bucket.EDIT)[0].text == "hello"


def test_prompt_goes_before_text_but_two_other_candidates_are_a_question(write):
    assert read_prompts(write('{"text": "whole", "prompt": "short"}'), Bucket.EDIT)[0].text == "short"
    path = write('{"text": "whole", "instruction": "short"}')
    with pytest.raises(PromptError, match=r"mine\.jsonl:1: `text`, `instruction` could each be the prompt"):
        read_prompts(path, Bucket.EDIT)
    assert read_prompts(path, Bucket.EDIT, columns=Columns(prompt="text"))[0].text == "whole"


def test_columns_say_where_everything_stands(write):
    path = write('{"q": "hello", "n": "x1", "topic": "t", "reply": "Sure.", "origin": "me"}')
    columns = Columns(prompt="q", id="n", group="topic", target="reply", source="origin")
    (prompt,) = read_prompts(path, Bucket.EDIT, columns=columns)
    assert (prompt.id, prompt.text, prompt.group, prompt.target, prompt.source) == ("x1", "hello", "t", "Sure.", "me")
    with pytest.raises(PromptError, match="no row has a column `topik`"):
        read_prompts(path, Bucket.EDIT, columns=Columns(prompt="q", group="topik"))


def test_limit_stops_the_reading(write):
    path = write('{"prompt": "one"}\n{"prompt": "two"}\nnot json\n')
    assert [p.text for p in read_prompts(path, Bucket.EDIT, limit=2)] == ["one", "two"]
    with pytest.raises(PromptError, match="limit 0"):
        read_prompts(path, Bucket.EDIT, limit=0)


GOOD = '{"id": "a", "prompt": "fine"}\n'


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (GOOD + '{"prompt": "cut', 2, "not JSON"),
        (GOOD + "[" * 100_000, 2, "not JSON"),
        (GOOD + '"just a string"', 2, "no JSON object"),
        (GOOD + '{"id": "b"}', 2, "no `prompt`"),
        (GOOD + '{"text": "elsewhere"}', 2, "no `prompt`"),
        (GOOD + '{"prompt": " \\n"}', 2, "is blank"),
        (GOOD + '{"prompt": null}', 2, "is blank"),
        (GOOD + '{"prompt": 5}', 2, "no string"),
        (GOOD + '{"prompt": ["a"]}', 2, "message 1 is no message with a role"),
        (GOOD + '{"prompt": "x", "id": true}', 2, "no string"),
        (GOOD + '{"prompt": "x", "target": 3}', 2, "no string"),
        (GOOD + '{"prompt": "\\ud800"}', 2, "surrogate"),
        (GOOD + "\n" + '{"id": "a", "prompt": "again"}', 3, r"id 'a' was already used at .*mine\.jsonl:1"),
        ('{"prompt": "one", "id": "mine-2"}\n{"prompt": "two"}', 2, "already used"),
        (GOOD.encode() + b'{"prompt": "caf\xe9"}', 2, "not UTF-8 .byte 0xe9"),
        (GOOD.encode("utf-16"), 1, "not UTF-8"),
        ('{"body": "x", "n": 1}', 1, "has the columns `body`, `n`"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(write, content, line, message):
    with pytest.raises(PromptError, match=rf"mine\.jsonl:{line}: .*{message}"):
        read_prompts(write(content), Bucket.EDIT)


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ('prompt,id\n"two\nlines",a\nx,b,c\n', 4, "3 cells where the header has 2"),
        ('prompt,id\n\nfine,a\n"never closed,b\n', 4, "not CSV"),
        ("prompt,id\nfine,a\n ,b\n", 3, "is blank"),
        ("prompt,id,id\nfine,a,b\n", 1, "more than once"),
        (b"prompt,id\ncaf\xe9,a\n", 2, "not UTF-8"),
    ],
)
def test_a_bad_csv_record_is_named_by_the_line_it_starts_on(write, content, line, message):
    with pytest.raises(PromptError, match=rf"mine\.csv:{line}: .*{message}"):
        read_prompts(write(content, "mine.csv"), Bucket.EDIT)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_rows_is_an_error(write, content):
    with pytest.raises(PromptError, match="holds no rows"):
        read_prompts(write(content), Bucket.EDIT)


def test_a_focus_is_one_group_however_it_is_written(write):
    rows = ["Blow up", "blow  up ", "BLOW UP"]
    path = write("".join(json.dumps({"prompt": f"prompt {i}", "focus": f}) + "\n" for i, f in enumerate(rows)))
    assert {p.group for p in read_prompts(path, Bucket.EDIT)} == {"blow up"}


def test_a_row_may_be_asked_behind_a_system_prompt_of_its_own(write):
    path = write('{"prompt": "one", "system": "Be brief."}\n{"prompt": "two"}\n')
    assert [p.system for p in read_prompts(path, Bucket.EDIT)] == ["Be brief.", None]
