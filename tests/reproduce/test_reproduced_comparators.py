"""Table 18: what `paving compare` measured, at the scale of the strict rule."""

from __future__ import annotations

import pytest

from made_up_comparison import made_up_comparison
from paving.reproduce import reproduce


def test_without_a_run_comparators_are_na_for_their_reason_and_the_papers_values_stand_there(make_run):
    found = reproduce("18", [])
    cells = [c for ln in found.blocks[0].lines for c in ln.cells.values()]
    assert all(c.lines == ("n/a",) and "paving compare RUN" in c.missing for c in cells)
    assert [ln.paper[0].cells["Edit ref."] for ln in found.blocks[0].lines] == ["86.8"] * 3 + ["78.9"] * 3


def test_table_18_takes_the_rows_that_the_strict_rule_chose(make_run):
    """A comparator that was not compared names its command; one of which no scale passes says so."""
    run = make_run("a")
    comparison = made_up_comparison(("act-add",)).model_copy(update={"judge": "rules-1"})

    def lines(**changes):
        (run / "comparison").mkdir(exist_ok=True)
        text = comparison.model_copy(update=changes).model_dump_json()
        (run / "comparison" / "comparison.json").write_text(text, encoding="utf-8")
        return {ln.name: ln.cells for ln in reproduce("18", [run]).blocks[0].lines}

    rows = [r.model_copy(update={"chosen_by": ["control/three", "strict/three"]}) for r in comparison.rows]
    oracle = next(r for r in rows if (r.method, r.variant) == ("act-add", "oracle"))
    found = lines(rows=rows)
    assert found["Edit-target oracle ActAdd"]["Edit ref."].value == pytest.approx(100 * oracle.row.refusal["edit"].rate)
    assert found["Edit-target oracle ActAdd"]["Scale"].value == oracle.scale
    assert "--method dim-act-sub --variant global" in found["DIM-style refusal direction"]["Edit ref."].missing
    other = lines(rows=rows, judge="rules-2")  # the run's own rows were judged by another one
    assert other["Edit-target oracle ActAdd"]["Edit ref."].value is None
    none = [c.model_copy(update={"scale": None}) if c.rule == "strict" else c for c in comparison.choices]
    assert "No scale of it keeps" in lines(choices=none)["Edit-target ActAdd"]["Edit ref."].missing
