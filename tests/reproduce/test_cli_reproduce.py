"""`paving reproduce`: where it prints, what it writes, what it refuses."""

from __future__ import annotations

import json

import pytest

import command_line


@pytest.fixture(autouse=True)
def _terminal_of_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def printed(*arguments) -> str:
    return command_line.printed("reproduce", *arguments)


def refused(*arguments) -> str:
    return command_line.refused("reproduce", *arguments)


@pytest.fixture
def runs(make_run):
    return [make_run(f"s{i}", seed=i) for i in (0, 1)]


@pytest.mark.parametrize("table", ["1", "2/19", "3", "4", "5", "6", "7", "14", "15", "16", "17", "18", "20"])
def test_every_table_fits_80_columns_and_no_cell_is_cut(runs, table):
    text = printed(table, "--runs", runs[0], runs[1])
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text.replace("{5, …, 33}", "")
    if table in ("1", "3", "16"):
        assert "s{0, 1}" in text and "not the paper's protocol" in text


def test_run_folders_stand_after_runs_or_alone_or_after_each_runs(runs):
    a, b = runs
    assert printed("1", "--runs", a, b) == printed("1", a, b) == printed("1", "--runs", a, "--runs", b)


def test_json_and_nothing_else(runs):
    assert json.loads(printed("1", *runs, "--json"))["table"] == "1"


def test_markdown_goes_where_it_is_asked(runs, tmp_path):
    file = tmp_path / "new" / "table.md"
    assert printed("1", *runs, "--out", file).strip() == f"table 1: {file}"
    assert file.read_text(encoding="utf-8") == printed("1", *runs, "--markdown")
    assert list(file.parent.iterdir()) == [file]


def test_an_existing_file_stays_unless_forced(runs, tmp_path):
    file = tmp_path / "table.md"
    file.write_text("mine", encoding="utf-8")
    assert "exists already" in refused("1", *runs, "--out", file) and file.read_text(encoding="utf-8") == "mine"
    printed("1", *runs, "--out", file, "--force")
    assert file.read_text(encoding="utf-8").startswith("## Table 1")


def test_a_refused_table_leaves_no_file(tmp_path):
    refused("1", tmp_path / "nothing", "--out", tmp_path / "table.md")
    assert list(tmp_path.iterdir()) == []


def test_a_figure_is_written_as_its_suffix_says(runs, tmp_path):
    for suffix, start in ((".svg", b"<?xml"), (".png", b"\x89PNG")):
        file = tmp_path / f"figure{suffix}"
        assert printed("figure-3", runs[0], "--out", file).strip() == f"figure-3: {file}"
        assert file.read_bytes().startswith(start)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["8"], "allowed: 1, 2, 3"),
        (["figure-1"], "allowed: 1, 2, 3"),
        (["1"], "--runs RUN"),
        (["figure-3"], "--out figure-3.svg"),
        (["figure-3", "--out", "f.pdf"], "--out figure-3.svg"),
        (["figure-3", "--json"], "for tables"),
        (["1", "--json", "--markdown"], "Ask for one"),
        (["1", "--json", "--out", "t.md"], "contradict"),
        (["1", "--out", "table.txt"], "allowed: .md, .json"),
        (["1", "--runs", "no-such-folder"], "no-such-folder is no run folder"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_names_of_runs_are_no_markup(make_run):
    assert "[red]" in printed("15", make_run("[red]"))
