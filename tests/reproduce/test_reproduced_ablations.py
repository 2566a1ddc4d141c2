"""Tables 2, 14 and 19: the full recipe is found among its ablations, and every row says what it changed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from made_up_runs import ORACLE, OTHER, ROWS, VETOED, cell, changed, lines

from paving.prompts.types import Bucket
from paving.reproduce import reproduce

EDIT, BENIGN, HARMFUL = Bucket


@pytest.fixture
def study(make_run):
    """The full recipe with policy and mixture rows, two ablations of it, and a run that is none."""
    rows = (
        *ROWS[:3],
        replace(VETOED, name="soft+veto", policy="soft", refused=(3, 1, 19)),
        replace(VETOED, name="uniform", refused=(30, 1, 24), harmful=(2, 0, 0)),
        replace(VETOED, name="expert:1", refused=(25, 1, 24)),
        ORACLE,
    )
    contrastive = tuple(replace(p, refused=(18, 1, 24)) if p is VETOED else p for p in ROWS)
    return [
        make_run("early", changed(OTHER, training__contrastive_epochs=0), rows=contrastive),
        make_run("full", OTHER, rows=rows),
        make_run("k1", changed(OTHER, controller__n_experts=1, controller__centres=[0.5], controller__widths=[0.4])),
        make_run("other", changed(OTHER, training__learning_rate=1e-3)),
    ]


def test_table_19_finds_the_full_recipe_whatever_the_order_and_its_ablations(study):
    for folders in (study, study[::-1]):
        found = reproduce("19", folders)
        assert found.blocks[0].title == "full recipe: full"
        edit = {name: line.cells["Edit ref."].value for name, line in lines(found).items()}
        assert edit["Training objective: No contrastive warmup"] == pytest.approx(45.0)
        assert edit["Gate policy: Soft gate + veto"] == pytest.approx(7.5)
        assert edit["Gate policy: Thresholded-soft + veto"] == edit["Expert policy: Learned mixture"] == pytest.approx(12.5)
        assert edit["Expert policy: Uniform mixture"] == pytest.approx(75.0)
        assert edit["Architecture/horizon: single-expert"] == pytest.approx(12.5)
        assert [ln.name for ln in found.blocks[1].lines] == ["other: differs in training.learning_rate"]


def test_table_19_says_what_would_fill_an_empty_row(study):
    found = reproduce("19", study)
    assert "--mixture expert:0" in cell(found, "Expert policy: Expert 0 only", "Edit ref.").missing
    assert "--policy hard+veto" in cell(found, "Gate policy: Hard gate + veto", "Edit ref.").missing
    assert "(short-horizon) was given" in cell(found, "Architecture/horizon: Short horizon", "Score").missing
    assert "no configuration" in cell(found, "Training objective: Paired-benign targets", "Edit ref.").missing


def test_the_last_column_of_table_19_holds_what_each_block_holds(study):
    found = reproduce("19", study)
    gates = cell(found, "Gate policy: Thresholded-soft + veto", "Other fixed values").lines
    assert gates == ("gates 1.70/0.04/0.10;", "veto 5.0/0.0/83.3")  # mean gate times scale 2
    assert cell(found, "Expert policy: Uniform mixture", "Other fixed values").lines == ("Non-op NR 20.0",)  # 40 - 30 - 2
    shape = cell(found, "Architecture/horizon: Full recipe", "Other fixed values").lines
    assert shape == ("router 1-4;", "edit 5-29;", "horizon 12")
    score = cell(found, "Training objective: Full recipe", "Score").value
    assert score == pytest.approx(35 / 40 + 0.10 * 0.98 + 0.10 * 22 / 24)


def test_table_2_has_the_same_figures(study):
    two, nineteen = reproduce("2", study), reproduce("19", study)
    pairs = {
        "Training objective: - Contrastive warmup": "Training objective: No contrastive warmup",
        "Gate policy: Soft gate (no thresholding) + veto": "Gate policy: Soft gate + veto",
        "Full method: Residual Paving (default)": "Training objective: Full recipe",
    }
    for short, long in pairs.items():
        assert cell(two, short, "Edit ref.") == cell(nineteen, long, "Edit ref.")
        assert cell(two, short, "Harm. pres.") == cell(nineteen, long, "Harmful pres.")


def test_another_operating_point_than_the_full_recipes_is_told(make_run, study):
    at_8 = tuple(replace(p, scale=8.0) if p.scale else p for p in ROWS)
    found = reproduce("19", [*study[1:], make_run("slow", changed(OTHER, training__horizon=6), rows=at_8)])
    told = [n for n in found.notes if "operating point" in n]
    assert told == [
        "short-horizon runs at another operating point than the full recipe: 8 thresholded; there 2 thresholded."
    ]


def test_a_late_router_of_a_recipe_that_reads_late_is_put_in_its_place(make_run):
    full = changed(OTHER, controller__route_layers=[8, 12, 16], controller__edit_layers=list(range(5, 30)))
    late = changed(full, controller__route_layers=[7, 8, 9, 10])
    found = reproduce("19", [make_run("full", full), make_run("late", late)])
    assert cell(found, "Architecture/horizon: Late router layers", "Edit ref.").value is not None
    assert any("reads blocks 8, 12, 16 itself" in note for note in found.notes)


def test_a_file_may_be_spelled_relatively_in_one_run_and_absolutely_in_the_other(make_run):
    full = changed(OTHER, model="/home/me/bench/organism", benign="/home/me/bench/alpaca.jsonl")
    variant = changed(full, model="./bench/organism", benign="bench/alpaca.jsonl", training__contrastive_epochs=0)
    found = reproduce("19", [make_run("full", full), make_run("variant", variant)])
    assert cell(found, "Training objective: No contrastive warmup", "Edit ref.").value is not None
    assert not any("held out other prompts" in note for note in found.notes)
    shorter = make_run("shorter", variant, sizes=(40, 21, 30))
    other = reproduce("19", [make_run("full2", full), shorter])
    assert any("no-contrastive held out other prompts" in note for note in other.notes)


def test_another_model_of_the_same_name_is_no_ablation(make_run):
    variant = make_run("variant", changed(OTHER, training__contrastive_epochs=0))
    full = make_run("full", OTHER)
    for folder, fingerprint in ((variant, "aa"), (full, "bb")):
        path = folder / "controller" / "controller.json"
        content = json.loads(path.read_text())
        content["base"]["fingerprint"] = fingerprint
        path.write_text(json.dumps(content))
    found = reproduce("19", [full, variant])
    assert [ln.name for ln in found.blocks[1].lines] == ["variant: another base (fingerprint aa, the full recipe's bb)"]


def test_two_runs_of_one_ablation_are_refused(make_run, study):
    twin = make_run("twin", changed(OTHER, training__contrastive_epochs=0), judge="rules-2")
    with pytest.raises(ValueError, match="early and twin are both the ablation `no-contrastive`"):
        reproduce("19", [*study, twin])


def test_table_14_has_the_capacity_variants_and_says_how_to_make_the_steering_rows(study):
    found = reproduce("14", study)
    assert cell(found, "Single residual map, oracle", "Edit succ.").value == pytest.approx(100.0)
    assert cell(found, "Full recipe, thresh.-soft", "Harm ref.").value == pytest.approx(100 * 22 / 30)
    assert "no-trajectory" in cell(found, "MLP no trajectory loss, oracle", "Scale").missing
    assert "--method act-add --variant probe" in cell(found, "ActAdd safe-ref., probe-soft", "Scale").missing
    assert [p.name for p in lines(found)["Single residual map, oracle"].paper] == [
        "paper, Phi-4 mini, Gemma-3-4B-IT (another backbone)", "paper, Qwen2.5-7B, Gemma-3-4B-IT (another backbone)",
    ]  # fmt: skip
