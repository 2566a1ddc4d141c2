"""The report's diagnostics: every part that was measured is drawn and tabled, and a part without data says so."""

from __future__ import annotations

import re

import made_up_diagnostics as made_up
import pytest

from paving.evaluation.diagnostics import records as r
from paving.report import diagnostic_figures, diagnostic_tables, page
from paving.report.diagnostics import diagnosis_lines, experts_sentence, usefulness_sentence

NONE = r.Spread(mean=None, sd=None, n=0)


@pytest.fixture(scope="module")
def experts(metrics):
    return made_up.experts(metrics)


@pytest.fixture(scope="module")
def grid(metrics):
    return made_up.grid(metrics)


@pytest.fixture(scope="module")
def route():
    return made_up.route()


@pytest.fixture(scope="module")
def norms():
    return made_up.norms()


@pytest.fixture(scope="module")
def usefulness():
    return made_up.usefulness()


@pytest.fixture(scope="module")
def found(experts, grid, route, norms, usefulness):
    return r.Diagnostics(
        run="x", judge="rules", keys={}, seconds={}, skipped={"probes": "not asked for"}, norms=norms, route=route,
        usefulness=usefulness, experts=experts, grid=grid,
    )  # fmt: skip


def test_every_measured_part_is_on_the_page_and_no_other(metrics, found):
    source = page.render(metrics, diagnostics=found)
    for heading in ("How large the edit is", "Route calibration and the veto", "What each expert does", "Gate × mixture"):
        assert heading in source
    assert "A router made worse" not in source and "Where the edit moves" not in source
    assert "Not measured: probes." in source and "ROUGE-L and chrF were not measured" in source
    assert source.count("<svg") == 5 + 3  # the page's own, and norms, veto, grid
    assert not re.search(r">(None|nan)<", source)


def test_a_second_judges_page_says_whose_labels_the_diagnostics_are(metrics, found):
    says = "those of the run's own judge, rules."
    assert says in page.render(metrics.model_copy(update={"judge": "another"}), diagnostics=found).replace("&#39;", "'")
    own = page.render(metrics.model_copy(update={"judge": "rules"}), diagnostics=found)
    assert says not in own.replace("&#39;", "'")


@pytest.mark.parametrize(
    "draw, empty",
    [
        (diagnostic_figures.norms, r.NormsRecord(policy="x", prompts={}, edited_layers=[], layers=[])),
        (diagnostic_figures.veto, r.RouteCalibration(routes=[], vetoes=[], curve=[])),
        (diagnostic_figures.grid, r.CellBlock(prompts={}, cells=[])),
        (diagnostic_figures.separability, r.ProbeCurve(layers=[], prompts={})),
        (
            diagnostic_figures.trajectory,
            r.TrajectoryRecord(
                policy="x", n_closed=0, n_short=0, edit=NONE, refusal=NONE, gap=NONE, layers=[], steps=[], nll_base=NONE,
                nll_edited=NONE, nll_reduction=None, paths={},
            ),
        ),
    ],
)  # fmt: skip
def test_a_figure_without_data_says_so(draw, empty):
    assert "n/a (n=0)" in draw(empty)


def test_the_experts_sentence_names_the_best_alone_and_the_one_most_missed(experts):
    says = experts_sentence(experts)
    assert "mixture 8/10" in says and "uniform one 7/10" in says
    assert "best single expert is 1, with 6/10" in says
    assert "taking away expert 1 leaves fewest, 1/10" in says
    one = experts.model_copy(update={"cells": experts.cells[:1]})
    assert "no mixture to take apart" in experts_sentence(one)


def test_the_usefulness_sentence_has_its_yardstick(usefulness):
    says = usefulness_sentence(usefulness)
    assert "Of 8 answers edited by learned, 2 are broken" in says and "25.0%" in says and "2.0%" in says
    assert "n/a (n=0)" in usefulness_sentence(r.Usefulness(answers=[], notes=[]))


def test_tables_show_what_is_missing_as_missing(route, experts, usefulness):
    routes = diagnostic_tables.routes(route)
    assert [c.text for c in routes.rows[0]][-2:] == ["7.20 / 0.20 / n/a", "0.0 / 0.0 / 90.0"]
    assert routes.rows[1][-1].text == "no veto"
    table = diagnostic_tables.cells(experts, mixtures_only=True)
    assert table.columns[0] == "mixture" and [row[0].text for row in table.rows][:2] == ["router", "uniform"]
    assert diagnostic_tables.prompts_of(experts) == "10 edit, 10 benign keep and 10 harmful keep prompts"
    assert "BERTScore" not in diagnostic_tables.usefulness(usefulness).columns
    assert diagnostic_tables.usefulness(usefulness).rows[0][7].text == "n/a"


def test_the_terminal_says_what_was_found_and_what_was_not_measured(found):
    lines = diagnosis_lines(found)
    assert any("best single expert" in line for line in lines)
    assert lines[-1] == "not measured: probes (not asked for)"
