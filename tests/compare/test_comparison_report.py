"""The comparators' part of the page, on made-up figures."""

from __future__ import annotations

import pytest
from matplotlib import rc_context

from made_up_comparison import BASE_REFUSED, METHODS, OWN_ROWS, compared, made_up_comparison, row
from paving.evaluation.comparison import OWN
from paving.evaluation.statistics import wilson
from paving.report import comparison, comparison_figures, comparison_table, nothing_passes
from paving.report.svg import STYLE


@pytest.fixture(scope="module")
def found():
    return made_up_comparison(("dim-ablation", "repit"))


def with_row(found, extra):
    return found.model_copy(update={"rows": [*found.rows, extra]})


def test_there_is_a_mark_for_every_method_and_variant_and_for_residual_paving(found):
    with rc_context(STYLE):
        panels = comparison_figures.draw_trade_off(found).axes
    assert len(panels) == 2
    for ax, rule in zip(panels, ("control", "strict"), strict=True):
        marks = [line for line in ax.lines if line.get_marker() in set("xoDsv^") and len(line.get_xdata()) == 1]
        drawn = [tuple(line.get_xydata()[0]) for line in marks]
        rows = [r for r in found.rows if r.row.name in ("base", *OWN_ROWS) or f"{rule}/three" in r.chosen_by]
        rings = [line for line in ax.lines if line.get_marker() == "o" and line.get_markersize() == comparison_figures.RING]
        assert len(rings) == (rule == "strict")  # there the rule took another scale than training did
        drawn = [point for point, line in zip(drawn, marks, strict=True) if line not in rings]
        assert len(drawn) == len(rows) >= 1 + 3
        expected = {(100 * r.row.harmful_drift, 100 * r.edit_success.rate) for r in rows}
        assert {(round(x, 6), round(y, 6)) for x, y in drawn} == {(round(x, 6), round(y, 6)) for x, y in expected}


def test_a_panel_shows_what_its_rule_took_and_nothing_else(found):
    strict = compared("repit", "probe", row("repit@1_probe", "comparator", "probe", 1.0, 3, 80), ["strict/three"])
    both = with_row(found, strict)
    assert comparison_figures.shown_rows(both, "control") == comparison_figures.shown_rows(found, "control")
    assert strict in comparison_figures.shown_rows(both, "strict")


def test_the_picture_holds_every_name_and_an_empty_one_says_so(found):
    svg = comparison_figures.trade_off(found)
    assert all(name in svg for name in ("dim-ablation", "repit", "Residual Paving, learned+veto", "shape: oracle"))
    assert "n/a (n=0)" in comparison_figures.trade_off(found.model_copy(update={"rows": []}))


def test_the_finding_names_a_comparator_that_is_as_good_and_none_that_is_told_the_buckets(found):
    assert "By the control score Residual Paving (learned+veto, scale 4) answers 192 of" in comparison.finding(found)
    assert "None of 6 comparator rows" in comparison.finding(found)
    assert "By the strict limits Residual Paving (learned+veto, scale 2) answers 160 of" in comparison.finding(found)
    assert "No comparator row was measured beside it" in comparison.finding(found)  # by the strict rule none was taken
    told = compared("rdo", "oracle", row("rdo@4_oracle", "diagnostic", "oracle", 4.0, 220, BASE_REFUSED), ["control/three"])
    assert "None of 6" in comparison.finding(with_row(found, told))
    better = compared("rdo", "probe", row("rdo@4_probe", "comparator", "probe", 4.0, 200, 90), ["control/three"])
    said = comparison.finding(with_row(found, better))
    assert "Of 7 comparator rows that could be deployed, 1 is at least as good" in said
    assert "rdo@4_probe, answers 200 of 220 edit prompts (90.9%) and moves harmful refusal by -1.9 pp" in said
    of_another_rule = better.model_copy(update={"chosen_by": ["strict/three"]})
    said = comparison.finding(with_row(found, of_another_rule))
    assert "None of 6" in said and "Of 1 comparator rows that could be deployed, 1 is" not in said.split("By the strict")[0]
    without = found.model_copy(update={"rows": [r for r in found.rows if r.method != OWN]})
    assert "n/a (n=0)" in comparison.finding(without)


def test_tables_show_what_was_chosen_and_never_a_zero_for_what_was_not_measured(found):
    main = comparison.rows_table(found)
    cells = {f"{r[0].text}/{r[1].text}": [c.text for c in r] for r in main.rows if r[2].text != "2"}
    assert [r[3].text for r in main.rows if r[2].text == "2"] == ["strict"]
    assert cells["Residual Paving/learned+veto"][4].startswith("192/220 87.3 [")
    assert cells["dim-ablation/global"][3] == "control" and cells["base/"][3] == ""
    benign = [r for r in comparison.benign_table(found).rows if r[0].text == "repit"]
    assert {r[5].text for r in benign} == {"91.0"} and {r[7].text for r in benign} == {"n/a"}
    assert all(r[7].sort is None for r in benign)
    silent = found.rows[-1].model_copy(update={"edit_success": wilson(0, 0)})
    assert comparison.rows_table(with_row(found, silent)).rows[-1][4].text == "n/a (n=0)"
    both = found.model_copy(update={"objectives": ["two", "three"]})
    assert comparison.rows_table(both).rows[-1][3].text == "control (three)"


def test_a_rule_that_finds_nothing_says_so_on_the_page_and_on_the_terminal(found):
    nothing = sum(c.scale is None for c in found.choices)
    assert 0 < nothing == len(nothing_passes(found)) < len(found.choices)
    texts = [c.text for r in comparison.choices_table(found).rows for c in r]
    assert texts.count(comparison.NOTHING) == nothing
    assert f"for {nothing} of 8 choices" in comparison.strict_text(found)
    assert len(comparison_table(found).rows) == len(found.rows)


def test_a_scale_that_was_left_out_and_a_reconstructed_method_are_named(found):
    noted = found.model_copy(update={"methods": [found.methods[0].model_copy(update={"note": "reconstructed"})]})
    assert comparison.methods_text(noted) == [
        ("dim-ablation", "scales 1, 4; 8, 16 left out, since nearly every edit answer was broken already; reconstructed")
    ]
    marked = found.model_copy(update={"rows": [found.rows[-1].model_copy(update={"notes": ["reconstructed"]})]})
    assert comparison.rows_table(marked).rows[0][0].text == "repit *"
    assert comparison.rows_to_show(found) == ["base", "learned+veto", "dim-ablation@4_global", "repit@4_global"]
    assert len(METHODS) == 10 and len(set(comparison_figures.METHOD_COLOURS)) >= 10, "each its own colour"


def test_a_method_that_could_not_be_fitted_says_why_beside_its_name(found):
    failed = found.methods[0].model_copy(update={"name": "caa", "scales": [], "failed": "made up to fail"})
    lines = dict(comparison.methods_text(found.model_copy(update={"methods": [*found.methods, failed]})))
    assert lines["caa"] == "could not be fitted: made up to fail" and lines["repit"].startswith("scales 1, 4")
