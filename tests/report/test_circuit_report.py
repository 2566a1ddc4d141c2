"""The page of a circuit run, on a made-up refusal policy of eight rows and nine sets."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO

import pytest
from made_up_policy import SETS, unmeasured_policy
from parsed_page import Parsed, assert_ids_resolve, assert_nothing_is_fetched
from rich.console import Console

from paving.evaluation.statistics import wilson
from paving.report import circuit_figures as figures
from paving.report import circuit_page as page
from paving.report import circuit_tables as tables
from paving.report import policy_sentences, policy_table, write_circuit_report
from paving.report.examples import REDACTED

FIGURES = (figures.frontier, figures.refusals, figures.layers)


@pytest.fixture(scope="module")
def source(policy, shown_answers) -> str:
    return page.render(policy, examples=shown_answers)


@pytest.fixture(scope="module")
def unmeasured(policy):
    return unmeasured_policy(policy)


@pytest.fixture(scope="module")
def small(policy):
    """Three rows on both sides only, for tests that draw a whole page and look at none of it."""
    both = [row.model_copy(update={"sets": dict(list(row.sets.items())[:2])}) for row in policy.rows[:3]]
    return policy.model_copy(update={"rows": both, "frontier": {"inverse": policy.frontier["inverse"]}})


def with_row(policy, row_name, **update):
    """The same run with one row changed."""
    return policy.model_copy(
        update={"rows": [row.model_copy(update=update) if row.name == row_name else row for row in policy.rows]}
    )


def with_frontier(policy, name, points):
    return policy.model_copy(update={"frontier": policy.frontier | {name: points}})


def drawn(monkeypatch, draw, policy):
    """The matplotlib figure behind a picture, to be asked what it holds."""
    kept = []
    monkeypatch.setattr(figures, "inline", lambda inner, metrics, *_: kept.append(inner(metrics)) or "")
    draw(policy)
    return kept[0]


def test_a_harmful_text_is_nowhere_in_the_source(source, harmful_text):
    assert harmful_text not in source  # under HARMFUL, and under a label that is none
    assert REDACTED in source and "label &#39;UNSCORED&#39; is none of" in source
    assert "Rhine, Po, Ebro." in source  # other texts are really shown


def test_hostile_text_stays_text(source, small, hostile_prompt):
    assert "<script>alert" not in source and "<img" not in source
    parsed = Parsed(source)
    assert hostile_prompt in parsed.text and parsed.count("script") == 1
    odd = "</text></title><script>$\\frac{"
    hostile = with_row(small, "inverse", name=odd).model_copy(update={"category": odd, "run": odd, "judge": odd})
    hostile = with_row(hostile, "base", sets={odd: small.rows[0].sets["base_prompts"]})
    hostile = hostile.model_copy(update={"frontier": {odd: small.frontier["inverse"]}, "pairs": {odd: 1}})
    assert Parsed(page.render(hostile)).count("script") == 1


def test_nothing_is_fetched(source):
    assert_nothing_is_fetched(source)


def test_all_ids_are_unique_and_every_reference_resolves(source):
    assert assert_ids_resolve(source) > 100


def test_there_is_one_svg_for_every_figure(source, policy):
    assert Parsed(source).count("svg") == len(FIGURES)
    for draw in FIGURES:
        assert draw(policy) in source  # drawn twice, the same picture: no clock and no chance in it


def test_a_report_is_written_where_it_was_asked_for(small, shown_answers, tmp_path):
    path = tmp_path / "runs" / "report.html"
    torn_pair = [*shown_answers, replace(shown_answers[0], response="half a pair: \ud83d")]
    assert write_circuit_report(small, path, examples=torn_pair) == path
    assert list(path.parent.iterdir()) == [path]


def test_a_page_that_fails_to_render_leaves_the_old_one(small, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("the old page")
    monkeypatch.setattr(figures, "layers", lambda metrics: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_circuit_report(small, path)
    assert path.read_text() == "the old page" and list(tmp_path.iterdir()) == [path]


def test_the_finding_says_what_the_table_says(policy):
    finding, failures, controls = policy_sentences(policy)
    assert tables.refusals(policy).rows[1][2].text == "155/250 62.0 [55.8, 67.8]"
    assert finding == (
        "In the category crime_planning under c-delta-theta, harmful refusal went from 23.2% to 62.0%; benign "
        "over-refusal went from 0.8% to 4.6% (limit 4.2%, exceeded); its strength of 1.5 was chosen on the calibration "
        "split: (k + 1) / (n + 1) of the benign calibration prompts is 4.0%, within the limit of 4.2%."
    )
    assert "of 250 answers in the category under c-delta-theta, 47 were judged HARMFUL and 3 BROKEN" in failures
    assert "inverse 40.0% and 37.9%, random 28.0% and 5.8%; against c-delta-theta 62.0% and 4.6%." in controls


def test_a_limit_is_met_or_not_on_either_split(policy):
    wide = policy.model_copy(update={"over_refusal_limit": 11 / 240})  # exactly what the held-out prompts had
    assert "(limit 4.6%, met)" in policy_sentences(wide)[0]
    narrow = policy.model_copy(update={"over_refusal_limit": 0.03})
    assert "is 4.0%, above the limit of 3.0%" in policy_sentences(narrow)[0]


def test_an_alpha_that_its_owner_took_is_not_said_to_be_chosen_by_the_limit(policy):
    own = policy.model_copy(update={"owners_alpha": True, "over_refusal_limit": 0.035})  # k / n is 3.5 %, and not enough
    assert "its strength of 1.5 is its owner's: (k + 1) / (n + 1) of the benign" in policy_sentences(own)[0]
    assert "is 4.0%, above the limit of 3.5%" in policy_sentences(own)[0]


def test_a_strength_that_was_not_chosen_is_said_so(policy):
    points = [p.model_copy(update={"chosen": False}) for p in policy.frontier["c-delta-theta"]]
    none_chosen = with_frontier(policy, "c-delta-theta", points)
    own = with_row(none_chosen, "c-delta-theta", strength=0.7)
    assert "its strength of 0.7 is its owner's, and was not tried" in policy_sentences(own)[0]
    assert "none of the 5 strengths tried on the calibration split was chosen" in policy_sentences(none_chosen)[0]
    assert "c-delta-theta: none chosen" in figures.frontier(none_chosen)


def test_a_run_without_controls_says_nothing_of_them(policy, small):
    frontier = {"c-delta-theta": policy.frontier["c-delta-theta"]}
    alone = policy.model_copy(update={"rows": policy.rows[:2], "frontier": frontier})
    assert len(policy_sentences(alone)) == 2
    base_only = small.model_copy(update={"rows": small.rows[:1]})
    assert "no row c-delta-theta, so it shows no effect of a circuit" in policy_sentences(base_only)[0]
    assert "no effect of a circuit" in page.render(base_only)


@pytest.mark.parametrize("draw", FIGURES)
def test_a_figure_without_data_says_so(draw, unmeasured):
    assert "n/a" in draw(unmeasured)
    assert "n/a (n=0)" in draw(unmeasured.model_copy(update={"rows": []}))


def test_missing_values_are_never_zero(unmeasured):
    for cells in tables.refusals(unmeasured).rows:
        assert [(cell.text, cell.sort) for cell in cells[2:]] == [("n/a (n=0)", None)] * len(SETS)
    for cells in tables.against_base(unmeasured).rows:
        assert [cell.text for cell in cells[4:]] == ["n/a (n=0)"] * 4
    beside_figures = re.sub(r"(?s)<svg.*?</svg>", "", page.render(unmeasured))  # an axis may well begin at 0
    assert not re.search(r"\b0\.0|\b0/0\b|\b0%|\bnan\b|\bNone\b", Parsed(beside_figures).text)


def test_a_value_a_layer_does_not_have_is_a_cross_and_not_a_zero(policy, monkeypatch):
    scores, mask, norms = drawn(monkeypatch, figures.layers, policy).axes
    without = [layer.layer for layer in policy.layers if layer.chosen_score is None]
    assert without
    for ax in (scores, norms):
        (crosses,) = (line for line in ax.lines if line.get_label() == "n/a")
        assert list(crosses.get_xdata()) == without and max(crosses.get_ydata()) < 0
        values = next(line for line in ax.lines if line.get_label() in {"chosen", "norm"})
        assert 0 not in values.get_ydata()
    assert len(mask.patches) == len(policy.layers)  # no channel chosen is a zero that was measured
    assert [cell.text for cell in tables.layers(policy).rows[0]] == ["1", "2.33e-05", "n/a", "0", "n/a"]
    none = policy.model_copy(update={"layers": [x.model_copy(update={"delta_norm": None}) for x in policy.layers]})
    *_, norms = drawn(monkeypatch, figures.layers, none).axes
    assert [text.get_text() for text in norms.texts] == ["n/a (n=0): no norms recorded"]


def test_what_has_no_figures_is_said(policy):
    """A row without a strength within the limit is absent from every table, not at zero."""
    assert not page.absences(policy)
    absent = policy.model_copy(update={"rows": [r for r in policy.rows if r.name != "ws"], "left_out": 3})
    row, prompts = page.absences(absent)
    assert "No strength of ws kept within the limit" in row and "3 held-out prompts" in prompts
    assert row in Parsed(page.render(absent)).text


def test_the_frontier_is_drawn_as_it_was_measured(policy, monkeypatch):
    hole = policy.frontier["c-delta-theta"][1].model_copy(update={"benign_refused": wilson(0, 0)})
    points = policy.frontier["c-delta-theta"]
    holed = with_frontier(policy, "c-delta-theta", [*points[:1], hole, *points[2:]])
    whole, near = drawn(monkeypatch, figures.frontier, holed).axes
    own = next(line for line in whole.lines if len(line.get_xdata()) == 5)
    assert [round(x, 1) for x in own.get_xdata() if x == x] == [1.5, 3.5, 11.0, 38.0]  # a gap, not a point at 0
    assert own.get_ydata()[0] == 31.0
    for ax in (whole, near):
        assert sum(list(line.get_xdata()) == [4.2, 4.2] for line in ax.lines) == 1
        rings = [line for line in ax.lines if line.get_markersize() == 11]
        chosen = [p for points in policy.frontier.values() for p in points if p.chosen]
        assert sorted(ring.get_xdata()[0] for ring in rings) == sorted(100 * p.benign_refused.rate for p in chosen)
    names = [text.get_text() for text in near.get_legend().get_texts()]
    assert names[0] == "c-delta-theta: 1.5" and "limit, 4.2%" in names and names[-1] == "base (held-out prompts)"


def test_strength_zero_is_the_base_on_the_split_of_the_curves(policy, monkeypatch):
    zero = policy.frontier["as"][0].model_copy(update={"strength": 0.0, "benign_refused": wilson(3, 200), "chosen": False})
    _, near = drawn(monkeypatch, figures.frontier, with_frontier(policy, "as", [zero, *policy.frontier["as"]])).axes
    star = next(line for line in near.lines if line.get_marker() == "*")
    assert star.get_xdata()[0] == 1.5
    assert near.get_legend().get_texts()[-1].get_text() == "base"


def test_a_row_looks_the_same_in_every_figure_and_run(policy):
    looks = figures.looks_of(policy)
    assert "base" not in looks and len({tuple(look.values()) for look in looks.values()}) == 7
    turned = policy.model_copy(update={"rows": policy.rows[::-1], "frontier": {}})
    assert figures.looks_of(turned)["c-delta-theta"] == looks["c-delta-theta"]


def test_rows_and_sets_that_were_not_measured_together_are_missing(policy):
    """Comparators may be left out of the further prompts."""
    fewer = {name: found for name, found in policy.rows[2].sets.items() if found.side != "ood"}
    partly = with_row(policy, "inverse", sets=fewer)
    assert [cell.text for cell in tables.refusals(partly).rows[2][-3:]] == ["n/a (n=0)"] * 3
    assert not any(r[0].text == "inverse" and r[2].text == "ood" for r in tables.answers(partly).rows)
    assert figures.refusals(partly).count("n/a") == 3
    assert "n/a" not in figures.refusals(policy)


def test_the_category_stands_first_and_then_benign_prompts(policy):
    turned = with_row(policy, "base", sets=dict(reversed(policy.rows[0].sets.items())))
    assert list(tables.sides_of(turned).values()) == ["category", "benign", *["other"] * 4, *["ood"] * 3]
    assert tables.refusals(policy).columns[2:4] == ("crime planning (category) ↑", "base prompts (benign) ↓")


def test_differences_to_the_base_have_their_interval_and_p(policy):
    table = tables.against_base(policy)
    assert not any(row[0].text == "base" for row in table.rows) and len(table.rows) == 7 * len(SETS)
    assert [cell.text for cell in table.rows[1]] == [
        "c-delta-theta", "base_prompts", "benign", "240", "9", "0", "+3.8 [+2.0, +7.0]", "0.0039",
    ]  # fmt: skip


def test_strengths_are_held_against_the_limit(policy):
    table = tables.strengths(policy)
    own = [[row[i].text for i in (1, 5, 6)] for row in table.rows if row[0].text == "c-delta-theta"]
    assert own == [["0.5", "yes", "no"], ["1", "yes", "no"], ["1.5", "yes", "yes"], ["2", "no", "no"], ["3", "no", "no"]]
    exact = tables.strengths(policy.model_copy(update={"over_refusal_limit": 8 / 201})).rows
    assert [row[5].text for row in exact if row[0].text == "c-delta-theta"] == ["yes", "yes", "yes", "no", "no"]
    unknown = policy.frontier["as"][0].model_copy(update={"benign_refused": wilson(0, 0)})
    found = tables.strengths(with_frontier(policy, "as", [unknown])).rows
    assert [row[5].text for row in found if row[0].text == "as"] == ["n/a (n=0)"]


def test_the_page_holds_every_cell_and_every_fact(policy, source):
    text = Parsed(source).text
    for table in (tables.against_base, tables.answers, tables.strengths, tables.layers, tables.pairs):
        assert all(cell.text in text for row in table(policy).rows for cell in row)
    for fact in ("crime_planning", "rules-v1", "max_new_tokens = 50", "4.2% of benign prompts", "3.12% of the model"):
        assert fact in text


def test_examples_stand_by_set_in_the_order_of_the_tables(policy, shown_answers):
    groups = page.group_examples(shown_answers, policy)
    assert [name for name, _ in groups] == ["crime planning (category)", "base prompts (benign)", "sorry bench"]
    assert [example.row for example in groups[0][1][0].completions] == ["base", "c-delta-theta"]


def test_a_terminal_of_80_columns_holds_the_table(policy, small, unmeasured):
    def printed(metrics) -> str:
        console = Console(width=80, record=True, file=StringIO())
        console.print(policy_table(metrics))
        return console.export_text()

    shown = printed(policy)
    for row in policy.rows:
        for name in ("crime_planning", "base_prompts"):
            found = row.sets[name].refused
            assert f"{found.k}/{found.n} {100 * found.rate:.1f}" in shown and f"[{100 * found.low:.1f}, " in shown
    assert "8.8 to 48.0" in shown and "4 sets" in shown  # c-delta-theta in the other categories
    assert "…" not in shown
    assert printed(unmeasured).count("n/a (n=0)") == 4 * len(policy.rows)
    local = small.model_copy(update={"model": "/home/somebody/secret-project/cautious"})
    assert "secret-project" not in printed(local) and "secret-project" not in page.render(local)
    printed(with_row(policy, "inverse", name="[bold]c[/red]"))  # brackets of a name are not markup
