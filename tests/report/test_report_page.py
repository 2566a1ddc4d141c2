"""The page of a run, on the synthetic metrics of conftest.py."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import matplotlib
import pytest
from parsed_page import Parsed, assert_ids_resolve, assert_nothing_is_fetched
from rich.console import Console

from paving import run as runs
from paving.evaluation.results import Rate
from paving.report import (
    Example,
    figures,
    page,
    tables,
    three_way_markdown,
    three_way_table,
    write_picture,
    write_report,
)
from paving.report.examples import REDACTED

FIGURES = (
    figures.three_way,
    figures.trade_off,
    figures.gate_histograms,
    figures.reliability,
    figures.training_curves,
)
NONE_OF_98 = Rate(k=0, n=98, rate=0.0, low=0.0, high=0.0377)


@pytest.fixture(scope="module")
def source(metrics, examples) -> str:
    return page.render(metrics, examples=examples)


def test_a_harmful_text_is_nowhere_in_the_source(source, harmful_text):
    assert harmful_text not in source
    assert REDACTED in source
    assert "Rhine, Po, Ebro." in source  # other texts are really shown


@pytest.mark.parametrize("label", ["HARMFUL", " harmful ", "UNSCORED", ""])
def test_a_text_is_shown_only_under_a_verdict_that_allows_it(harmful_text, label):
    example = Example("h-2", "harmful_keep", "a request", "learned", harmful_text, label)
    (redacted,) = page.redact([example])
    assert redacted.response.startswith("[redacted")
    assert redacted.prompt == "a request"


def test_hostile_text_stays_text(source, metrics, hostile_prompt):
    assert "<script>alert" not in source and "<img" not in source
    parsed = Parsed(source)
    assert hostile_prompt in parsed.text  # shown as it was written, template braces and all
    assert parsed.count("script") == 1
    hostile = metrics.model_copy(update={"model": hostile_prompt, "run": "</title><script>", "judge": "$\\frac{", "seed": 1})
    hostile_row = metrics.rows[1].model_copy(update={"name": "</text><script>$\\frac{"})
    hostile = hostile.model_copy(update={"rows": [metrics.rows[0], hostile_row]})
    assert Parsed(page.render(hostile)).count("script") == 1


def test_nothing_is_fetched(source):
    assert_nothing_is_fetched(source)


def test_all_ids_are_unique_and_every_reference_resolves(source):
    assert assert_ids_resolve(source) > 100


def test_there_is_one_svg_for_every_figure(source, metrics):
    assert Parsed(source).count("svg") == len(FIGURES)
    for draw in FIGURES:
        assert draw(metrics) in source  # drawn twice, the same picture: no clock and no chance in it
    assert not re.search(r"\d{4}-\d{2}-\d{2}T\d", source)


@pytest.mark.parametrize("draw", FIGURES)
def test_a_figure_without_data_says_so(draw, empty_metrics):
    assert "n/a (n=0)" in draw(empty_metrics)


def test_missing_values_are_never_zero(empty_metrics):
    table = tables.three_way(empty_metrics)
    for cells in table.rows:
        assert [cell.text for cell in cells[2:]] == ["n/a (n=0)"] * 5
        assert all(cell.sort is None for cell in cells[2:])
    assert "n/a (n=0)" in page.finding(empty_metrics)
    beside_figures = re.sub(r"(?s)<svg.*?</svg>", "", page.render(empty_metrics))  # an axis may well begin at 0
    assert not re.search(r"\b0\.0|\b0/0\b|\b0%|\bnan\b|\bNone\b", Parsed(beside_figures).text)


def test_a_measured_zero_is_a_zero(metrics):
    assert tables.rate_text(NONE_OF_98) == "0/98 0.0 [0.0, 3.8]"
    assert tables.drift_cell(metrics.rows[3]).text == "0.0 [-3.8, +3.8]"
    assert tables.drift_cell(metrics.rows[0]).text == "0.0", "the base has drifted from nothing"
    assert tables.points(-0.0001) == "0.0"


def test_the_finding_says_what_the_table_says(metrics):
    assert tables.rate_text(metrics.rows[0].refusal["edit"]) == "443/500 88.6 [85.5, 91.1]"
    finding = page.finding(metrics)
    assert "edit refusal went from 88.6% to 4.0%" in finding
    assert "harmful refusal moved by -16.3 pp (from 81.6% to 65.3%, n=98)" in finding
    assert "has edit refusal at 0.2%" in finding
    assert "3 were judged HARMFUL and 6 BROKEN" in page.failures(metrics)


def test_all_three_tables_hold_the_same_cells(metrics, source):
    markdown = three_way_markdown(metrics)
    console = Console(width=80, record=True, file=StringIO())
    console.print(three_way_table(metrics))
    terminal, text = console.export_text(), Parsed(source).text
    table = tables.three_way(metrics)
    for cells in table.rows:
        for column, cell in zip(table.columns, cells, strict=True):
            assert cell.text in markdown and cell.text in text
            # A terminal of 80 columns has intervals under their figures, and no room for the kind or those of preservation.
            parts = [part for part in re.split(r" (?=\[|\(n=)", cell.text) if "pres." not in column or part[0] != "["]
            assert column == "kind" or all(part in terminal for part in parts)
    assert "…" not in terminal
    assert {line.count("|") for line in markdown.splitlines()} == {8}


def test_a_shared_page_does_not_tell_where_a_model_lies(metrics):
    local = metrics.model_copy(update={"model": "/home/somebody/secret-project/cautious"})
    source = page.render(local)
    assert "secret-project" not in source and "editing of cautious" in source
    console = Console(width=80, record=True, file=StringIO())
    console.print(three_way_table(local))
    assert "secret-project" not in console.export_text()
    assert tables.model_name(metrics) == "made-up/Model-4B-IT"


def test_names_cannot_break_a_table(metrics):
    odd = metrics.model_copy(update={"rows": [metrics.rows[0].model_copy(update={"name": "a|b\n[bold]c[/red]"})]})
    assert "a\\|b [bold]c[/red]" in three_way_markdown(odd)
    console = Console(width=200, file=StringIO())
    console.print(three_way_table(odd))


def test_a_page_that_fails_to_render_leaves_the_old_one(metrics, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("the old page")
    monkeypatch.setattr(figures, "reliability", lambda metrics: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(metrics, path)
    assert path.read_text() == "the old page"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_page_and_no_litter(metrics, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("the old page")

    def torn(self, content):
        self.open("wb").write(content[:100])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(OSError, match="disk full"):
        write_report(metrics, path)
    assert path.read_text() == "the old page"
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_is_written_where_it_was_asked_for(metrics, examples, tmp_path):
    path = tmp_path / "runs" / "first" / "report.html"
    torn_pair = [*examples, replace(examples[0], response="half a pair: \ud83d")]
    assert write_report(metrics, path, examples=torn_pair, title="A title & more") == path
    assert "<title>A title &amp; more</title>" in path.read_text(encoding="utf-8")
    assert list(path.parent.iterdir()) == [path]


def test_base_stands_before_learned_and_buckets_in_order(metrics, examples):
    groups = page.group_examples(examples, metrics)
    assert [name for name, _ in groups] == ["edit", "benign keep", "harmful keep"]
    assert [example.row for example in groups[0][1][0].completions] == ["base", "learned"]


def test_the_chosen_threshold_is_read_off_the_logits(metrics):
    expected = sum(a > 2.0 for a in metrics.router.logits["edit"]) / 500
    assert figures.active_share(metrics)["edit"] == expected
    listed = metrics.model_copy(update={"router": metrics.router.model_copy(update={"logits": {}})})
    assert figures.active_share(listed)["edit"] == expected
    unlisted = listed.model_copy(update={"thresholds": metrics.thresholds[:3]})
    assert figures.active_share(unlisted) is None  # not the nearest point: that would be another threshold


def test_the_picture_is_a_file_of_its_own(metrics, tmp_path):
    assert write_picture(metrics, tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    svg = write_picture(metrics, tmp_path / "picture.svg").read_text()
    assert svg.startswith("<?xml") and "var(--" not in svg
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        write_picture(metrics, tmp_path / "picture.jpg")


def test_drawing_leaves_no_state(metrics):
    before = dict(matplotlib.rcParams)
    figures.three_way(metrics)
    assert dict(matplotlib.rcParams) == before


def test_benchmarks_stand_on_the_page_where_they_were_measured(metrics, utility, tmp_path):
    (tmp_path / "metrics.json").write_text(metrics.model_dump_json(), encoding="utf-8")
    assert "lm-evaluation-harness" not in runs.report(tmp_path).read_text(encoding="utf-8")
    (tmp_path / "utility.json").write_text(utility.model_dump_json(), encoding="utf-8")
    text = Parsed(runs.report(tmp_path).read_text(encoding="utf-8")).text
    table = tables.utility(utility)
    assert all(cell.text in text for row in table.rows for cell in row)
    assert [cell.text for cell in table.rows[0]][4:] == ["33.5", "30.0", "-3.5 pp [-5.8, -2.1]", "9/400 2.2 [1.2, 4.2]"]
    assert [cell.sort for cell in table.rows[1]][4:] == [None] * 4
    (tmp_path / "utility.json").write_text("{}")
    with pytest.raises(ValueError, match="Move it away"):
        runs.report(tmp_path)
