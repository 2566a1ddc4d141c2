"""The tables made from run folders: right figures in the right cells, the paper beside them, and n/a with its mend."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up_runs import (
    BASE,
    GEMMA,
    LEARNED,
    LOGITS,
    ORACLE,
    OTHER,
    ROWS,
    SIZES,
    VETO_LOGITS,
    VETOED,
    Plan,
    cell,
    changed,
    lines,
)

import paving.reproduce
from paving.evaluation.judges import Label
from paving.evaluation.paired import from_counts
from paving.evaluation.seeds import pooled_rate
from paving.evaluation.statistics import wilson
from paving.prompts.types import Bucket
from paving.reproduce import load_run, markdown, reproduce, settings
from paving.run_folder import RunConfig, RunError

EDIT, BENIGN, HARMFUL = Bucket


# --- one run --------------------------------------------------------------------------------------------------------


def test_table_1_has_wilsons_interval_and_tangos_beside_the_papers_row(make_run):
    found = reproduce("1", [make_run("a", GEMMA)])
    k, n = VETOED.refused[0], SIZES[0]
    rate = wilson(k, n)
    edit = cell(found, "learned+veto", "Edit ref.")
    assert edit.lines == ("5/40 12.5", f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]")
    assert edit.value == pytest.approx(12.5)
    drift, paired = cell(found, "learned+veto", "Harm Δ"), from_counts(0, 2, 30)
    assert drift.lines == ("-6.7", f"[{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]")
    assert cell(found, "learned+veto", "Harm. pres.").lines == ("95.0", "(n=30)")
    (paper,) = lines(found)["learned+veto"].paper
    assert paper.name == "paper, Gemma-3-4B-IT"
    assert paper.cells["Edit ref."] == "4.0 [2.6, 6.1]" and paper.cells["Harm Δ"] == "-16.3"
    assert lines(found)["learned"].paper == ()  # the paper's learned row is the one with the veto
    assert cell(found, "base", "Harm Δ").lines == ("0.0",)


def test_without_a_veto_the_learned_row_is_the_papers(make_run):
    found = reproduce("1", [make_run("a", GEMMA, rows=(BASE, LEARNED, ORACLE))])
    assert "learned+veto" not in lines(found)
    assert lines(found)["learned"].paper[0].cells["Edit ref."] == "4.0 [2.6, 6.1]"


def test_on_another_backbone_every_printed_row_says_so(make_run):
    run = make_run("a", OTHER, diagnosed=True)
    for table in paving.reproduce.TABLES:
        found = reproduce(table, [run])
        printed = [p.name for b in found.blocks for p in (*b.context, *(p for ln in b.lines for p in ln.paper))]
        rows = [name for name in printed if "Gemma" in name]
        assert all("(another backbone)" in name for name in rows), (table, rows)
        assert rows or table in ("5", "6", "7")  # there the backbone is a row, or the column says whose value it is
        assert found.protocol == () or "organism" in found.protocol[0]


def test_table_15_pairs_the_base_and_has_one_block_a_run(make_run):
    runs = [make_run(f"s{i}", GEMMA, seed=i) for i in (0, 1)]
    found = reproduce("15", runs)
    assert [b.title for b in found.blocks] == ["s0", "s1"]
    rate = wilson(22, 30)
    limits = f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
    assert cell(found, "learned+veto", "Harmful refusal").lines == ("22/30 73.3", limits)
    assert cell(found, "learned+veto", "Base harmful refusal").lines[0] == "24/30 80.0"


# --- several seeds --------------------------------------------------------------------------------------------------


def test_seeds_are_pooled_by_prompt_with_every_seeds_figure(make_run):
    more = replace(VETOED, refused=(9, 1, 20))
    runs = [
        make_run("s0", GEMMA, seed=0),
        make_run("s1", GEMMA, seed=1, rows=(BASE, LEARNED, more, ORACLE)),
    ]
    found = reproduce("1", runs)
    assert [b.title for b in found.blocks] == ["s{0, 1}"]
    edit = cell(found, "learned+veto", "Edit ref.")
    flags = [
        {i: label is Label.HARMLESS_REFUSAL for i, label in load_run(r).verdicts("learned+veto")[EDIT].items()} for r in runs
    ]
    pooled = pooled_rate(flags)
    assert pooled.repeated == 20  # the two splits share prompts, so Wilson's interval would be too narrow
    limits = f"[{100 * pooled.by_prompt.low:.1f}, {100 * pooled.by_prompt.high:.1f}]"
    assert edit.lines == ("14/80 17.5", limits, "(12.5, 22.5)")
    assert limits != f"[{100 * pooled.naive.low:.1f}, {100 * pooled.naive.high:.1f}]"
    assert cell(found, "learned+veto", "Harm Δ").lines[2] == "(-6.7, -13.3)"


def test_pooled_intervals_redraw_groups_where_the_run_wrote_them(make_run):
    folders = [make_run(f"s{i}", GEMMA, seed=i) for i in (0, 1)]
    alone = cell(reproduce("1", folders), "learned+veto", "Edit ref.").lines
    for folder in folders:
        ids = [json.loads(line)["id"] for line in (folder / "verdicts" / "base.jsonl").read_text().splitlines()]
        (folder / "groups.json").write_text(json.dumps({i: f"group {n // 10}" for n, i in enumerate(ids)}))
    grouped = cell(reproduce("1", folders), "learned+veto", "Edit ref.").lines
    assert grouped[0] == alone[0] and grouped[1] != alone[1]


def test_pooled_preservation_is_that_of_the_mean_divergence(make_run):
    other = tuple(replace(p, preservation=(0.5, 0.5)) if p is VETOED else p for p in ROWS)
    runs = [make_run("s0", seed=0), make_run("s1", seed=1, rows=other)]
    found = cell(reproduce("1", runs), "learned+veto", "Harm. pres.")
    assert found.value == pytest.approx(100 * np.exp((np.log(0.95) + np.log(0.5)) / 2))
    assert found.lines == ("68.9", "(95.0, 50.0)")


def test_settings_are_runs_that_differ_in_seeds_only(make_run):
    folders = [
        make_run("a1", OTHER, seed=1),
        make_run("b", changed(OTHER, training__horizon=40)),
        make_run("a0", OTHER, seed=0),
        make_run("c", OTHER, judge="rules-2"),
    ]
    assert [s.name for s in settings([load_run(f) for f in folders])] == ["a{0, 1}", "b", "c"]


def test_seeds_of_an_ablation_may_each_have_been_given_a_scale(make_run):
    def at(scale: float) -> RunConfig:
        return changed(OTHER, calibration__scales=[scale], calibration__policies=["thresholded"])

    folders = [make_run(f"s{i}/late", at(scale), seed=i) for i, scale in enumerate((1.0, 2.0, 1.0))]
    assert [s.name for s in settings([load_run(f) for f in folders])] == ["late (seeds 0, 1, 2)"]
    both = [make_run(f"x{scale:g}", at(scale)) for scale in (1.0, 2.0)]  # but one seed at two scales is two settings
    assert [s.name for s in settings([load_run(f) for f in both])] == ["x1", "x2"]


def test_one_experiment_is_not_counted_twice(make_run):
    with pytest.raises(RunError, match=r"a.* and .*b have one configuration and seed 3.*Give one of them"):
        reproduce("1", [make_run("a", seed=3), make_run("b", seed=3)])


def test_table_16_shows_each_seed_and_the_spread(make_run):
    less = replace(VETOED, refused=(9, 1, 24))
    rows = [ROWS, (BASE, LEARNED, less, replace(VETOED, name="soft", policy="soft"), ORACLE)]
    found = reproduce("16", [make_run(f"s{i}", GEMMA, seed=i, rows=r) for i, r in enumerate(rows)])
    assert list(lines(found)) == [
        "seed 0, no veto", "seed 0, thresholded veto", "seed 1, no veto", "seed 1, thresholded veto",
        "over seeds, no veto", "over seeds, thresholded veto",
    ]  # fmt: skip
    assert cell(found, "over seeds, thresholded veto", "Edit ref.").lines == ("17.5 ± 7.1", "12.5 to 22.5")
    assert cell(found, "seed 0, thresholded veto", "Veto rate").lines == ("5.0/0.0/83.3",)
    assert cell(found, "seed 0, no veto", "Veto rate").lines == ("–",)
    assert len(found.blocks[0].context) == 7
    both = [make_run(f"t{i}", OTHER, seed=i, rows=rows[1]) for i in (0, 1)]
    assert "seed 1, soft veto" in lines(reproduce("16", both))


# --- what is not there ----------------------------------------------------------------------------------------------


def test_an_unevaluated_run_is_na_with_the_command_that_mends_it(make_run):
    run = make_run("a", evaluated=False)
    for table in paving.reproduce.TABLES:
        text = markdown(reproduce(table, [run]))
        if table not in ("6", "18"):
            assert f"paving eval {run}".replace("_", "\\_") in text, table
    why = cell(reproduce("1", [run]), "oracle", "Edit ref.").missing
    assert why == f"a is not evaluated yet. Make it: paving eval {run}"


def test_an_undiagnosed_run_is_na_with_the_command_that_mends_it(make_run):
    run = make_run("a", GEMMA)
    four = reproduce("4", [run])
    assert cell(four, "Edit", "Edit align.").missing == f"a has no diagnostics.json. Make it: paving diagnose {run}"
    assert cell(four, "Edit", "Active gate").value == pytest.approx(85.0)  # metrics.json has this one
    assert f"(a) a has no diagnostics.json. Make it: paving diagnose {run}".replace("_", "\\_") in markdown(four)
    assert "paving diagnose" in cell(reproduce("20", [run]), "seed 0", "E-vs-HK probe").missing


def test_an_empty_bucket_is_na_and_never_zero(make_run):
    plans = tuple(replace(p, refused=(p.refused[0], p.refused[1], 0), harmful=(0, 0, 0), vetoed=None) for p in ROWS)
    found = reproduce("1", [make_run("a", rows=plans, sizes=(40, 20, 0))])
    for heading in ("Harm. ref.", "Harm Δ"):
        assert cell(found, "learned", heading).lines == ("n/a",) and cell(found, "learned", heading).value is None
    assert cell(found, "oracle", "Harm. ref.").missing == "a has no harmful_keep prompts (n=0)"


def test_without_verdicts_a_pooled_rate_has_no_interval_and_says_so(make_run):
    found = reproduce("1", [make_run("s0", seed=0), make_run("s1", seed=1, verdicts=False)])
    edit = cell(found, "learned", "Edit ref.")
    assert edit.lines == ("8/80 10.0", "[n/a]", "(10.0, 10.0)") and "paving eval" in edit.missing
    drift = cell(found, "learned", "Harm Δ")
    assert drift.lines == ("-20.0", "[n/a]") and "verdicts/" in drift.missing


def test_verdicts_that_are_not_those_counted_are_refused(make_run):
    run = make_run("a")
    path = run / "verdicts" / "learned.jsonl"
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([first.replace("HARMLESS-REFUSAL", "HARMFUL"), *rest]), encoding="utf-8")
    with pytest.raises(RunError, match=r"metrics\.json disagree on the refusals of edit.*paving eval"):
        reproduce("1", [run])
    path.write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match=r"learned\.jsonl is damaged"):
        reproduce("1", [run])


@pytest.mark.parametrize("name", ["metrics.json", "diagnostics.json", "config.json", "controller/controller.json"])
def test_a_damaged_file_is_named(make_run, name):
    run = make_run("a", diagnosed=True)
    (run / name).write_text('{"half": ', encoding="utf-8")
    with pytest.raises(RunError, match=name):
        reproduce("1", [run])


# --- the other tables -----------------------------------------------------------------------------------------------


def test_table_3_gains_and_sign_test(make_run):
    llama = RunConfig(model="meta-llama/Llama-3.2-1B-Instruct")
    found = reproduce("3", [make_run("gemma", GEMMA), make_run("llama", llama), make_run("mine", OTHER)])
    gain = (100.0 + 80.0) - (98.0 + 100 * 22 / 30)
    assert cell(found, "gemma: Gemma-3-4B-IT, oracle", "Keep-side gain").value == pytest.approx(gain)
    assert lines(found)["llama: Llama-3.2-1B-Instruct, oracle"].paper[0].cells["Keep-side gain"] == "+50.7"
    assert lines(found)["mine: organism, oracle"].paper == ()
    assert "3 of 3 with a gain, p = 0.125; median gain +8.7 pp" in found.notes[0]
    assert len(found.blocks[0].context) == 8  # the four backbones that were not run


def test_a_backbone_has_one_vote_in_the_sign_test(make_run):
    runs = [make_run("a", OTHER), make_run("b", changed(OTHER, training__horizon=40))]
    found = reproduce("3", runs)
    assert "1 of 1 with a gain" in found.notes[0] and "one vote" in found.notes[1]


def test_table_4_has_the_diagnostics_in_the_papers_units(make_run):
    found = reproduce("4", [make_run("a", GEMMA, diagnosed=True)])
    assert cell(found, "Edit", "Edit align.").lines == ("0.475 (0.118)", "(n=37)")
    assert cell(found, "Edit", "Anchor NLL effect").lines == ("-73.1%", "(NLL)")
    assert cell(found, "Benign keep", "Edit align.").lines == ("–",)
    assert cell(found, "Edit", "Base-path RMS").value == pytest.approx(3.21)
    assert cell(found, "Harmful keep", "Base-path RMS").missing == "a has no harmful_keep prompts (n=0)"
    keep = cell(found, "Benign keep", "Anchor NLL effect")
    assert keep.lines == ("+0.047 NLL", "(n=20)")
    assert lines(found)["Edit"].paper[0].cells["Edit align."] == "0.475 (0.118)"
    assert "a: edit-target minus refusal-like alignment +0.256 (n=37)." in found.notes


def test_table_5_tells_what_is_the_papers(make_run):
    run = make_run("a", changed(GEMMA, training__horizon=40))
    agrees = {name: line.cells["Agrees"].lines[0] for name, line in lines(reproduce("5", [run])).items()}
    assert [name for name, word in agrees.items() if word == "differs"] == ["Trace horizon"]
    assert agrees["Backbone"] == agrees["Intervention layers"] == agrees["Optimizers"] == "same"
    assert agrees["Gate threshold τ"] == agrees["Evaluation scale s"] == "its own"
    of_other = lines(reproduce("5", [make_run("b", OTHER)]))
    assert of_other["Backbone"].cells["Agrees"].lines == ("differs",)
    assert of_other["Intervention layers"].cells["Agrees"].lines == ("same rule",)  # every block after the router's
    assert of_other["Gate threshold τ"].cells["Value"].lines == ("0.5000",)


def test_table_6_checks_the_presets(make_run, monkeypatch):
    assert "Every preset is the paper's." in reproduce("6", []).notes
    presets = tuple(replace(p, scale=3.0) if "gemma-2" in p.model else p for p in paving.presets.PRESETS)
    monkeypatch.setattr("paving.presets.PRESETS", presets)
    assert "Presets that are not the paper's: Gemma-2-2B-IT." in reproduce("6", []).notes
    used = reproduce("6", [make_run("a", GEMMA)]).blocks[1].lines[0]
    assert used.cells["Intervention layers"].lines == ("5-33",) and used.paper[0].cells["Scale"] == "8"


def test_table_7_is_the_runs_own_calibration(make_run):
    run = make_run("a", changed(GEMMA, calibration__scales=[1.0, 3.0], calibration__harmful_cost=2.5))
    found = lines(reproduce("7", [run]))["Residual Paving, learned"].cells
    assert "s in {1, 3};" in found["Search range"].lines
    assert "2.5 lost harmful refusals" in found["Selection rule"].lines[0]
    assert found["Selection rule"].lines[-1] == "chosen: s = 2, thresholded"


def test_table_17_rates_power_and_source(make_run):
    own = changed(OTHER, edit="x.jsonl?label=safe", harmful="x.jsonl?label=unsafe", benign="x.jsonl")
    found = reproduce("17", [make_run("a", own)])
    assert cell(found, "learned", "Edit non-ref.").value == pytest.approx(90.0)
    assert cell(found, "learned", "Harm ASR").value == pytest.approx(40.0)
    assert cell(found, "oracle", "Edit benign").lines[0] == "0/40 0.0"  # reframes, which are no benign answers
    assert len(lines(found)["learned+veto"].paper) == 4 and len(lines(found)["oracle"].paper) == 2
    assert any("40 edit prompts can show" in note for note in found.notes)
    assert not any("no same-source run" in note for note in found.notes)
    two = tuple(replace(p, refused=(0, 1, 20), vetoed=None) for p in ROWS)
    few = reproduce("17", [make_run("b", changed(own, training__horizon=9), sizes=(2, 20, 30), rows=two)])
    assert any("2 edit prompts can show nothing" in note for note in few.notes)
    apart = reproduce("17", [make_run("c", changed(own, harmful="y.jsonl"))])
    assert any("c is no same-source run" in note for note in apart.notes)


def test_table_20_agrees_with_counting_by_hand(make_run):
    found = reproduce("20", [make_run("a", GEMMA, diagnosed=True)])
    raw, veto = (lines(found, 2)[n].cells for n in ("Raw router", "Thresholded-soft + veto"))
    assert raw["Edit active"].lines[0] == "37/40 92.5" and raw["Harmful false active"].lines[0] == "3/30 10.0"
    assert raw["Accuracy"].lines[0] == f"{37 + 19 + 27}/90 92.2"
    # The veto blocks the two first edit prompts, whose gates are open, and harmful keeps 3 to 27, whose gates are not.
    assert veto["Edit active"].lines[0] == "35/40 87.5" and veto["Harmful false active"].lines[0] == "2/30 6.7"
    metrics = load_run(make_run("b", OTHER)).metrics.router
    assert raw["Brier"].value == pytest.approx(metrics.brier) and raw["ECE"].value == pytest.approx(metrics.ece)
    gate = {b: 1 / (1 + np.exp(-np.array(LOGITS[b]))) * (np.array(LOGITS[b]) > 0.5) for b in Bucket}
    effective = {b: gate[b] * (np.array(VETO_LOGITS[b]) <= 0.25) for b in Bucket}
    squared = np.concatenate([(effective[b] - (b is EDIT)) ** 2 for b in Bucket])
    assert veto["Brier"].value == pytest.approx(squared.mean())
    high = lines(found, 3)["L2=0.1, high threshold"].cells
    assert high["Harmful recall"].lines[0] == "25/30 83.3" and high["Edit veto FP"].lines[0] == "2/40 5.0"
    assert high["Accuracy"].lines[0] == f"{38 + 20 + 25}/90 92.2"
    assert cell(found, "seed 0", "E-vs-HK probe").lines == ("AUC 0.540", "(block 4)")  # best of the blocks it reads, 1-4
    assert cell(found, "learned+veto", "Veto rate (E/B/H)", 1).lines == ("5.0 / 0.0 / 83.3",)
    low = lines(found, 3)["L2=0.1, low threshold"].cells
    assert low["Harmful recall"].lines[0] == "28/30 93.3" and low["Edit veto FP"].lines[0] == "6/40 15.0"
    assert cell(found, "Learned + soft low-threshold veto", "Edit gate", 1).lines == ("1.50",)


def test_a_run_without_a_veto_has_none_in_table_20(make_run):
    found = reproduce("20", [make_run("a", rows=(BASE, LEARNED, ORACLE))])
    assert "no veto" in cell(found, "Thresholded-soft + veto", "Brier", 2).missing
    assert "no veto" in cell(found, "L2=0.1, high threshold", "Accuracy", 3).missing
    assert cell(found, "Raw router", "Brier", 2).value is not None


# --- as a whole -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["21", "8", "table x", "", "1 2"])
def test_an_unknown_table_is_refused_with_those_there_are(asked):
    with pytest.raises(ValueError, match=r"allowed: 1, 2, 3, .*20, figure-2"):
        reproduce(asked, [])


@pytest.mark.parametrize("asked", ["2/19", "19", "Table 19", "tab. 19", "table-19"])
def test_a_table_may_be_called_as_people_call_it(make_run, asked):
    assert reproduce(asked, [make_run("a")]).table == "19"


def test_a_table_of_runs_needs_one():
    with pytest.raises(ValueError, match="--runs RUN"):
        reproduce("1", [])


def test_markdown_is_one_table_a_block_whatever_a_run_is_called(make_run):
    text = markdown(reproduce("1", [make_run("a|b*c", changed(OTHER, model="/m/x_<b>_|y"))]))
    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert len({len(row.replace("\\|", "").split("|")) for row in rows}) == 1
    assert "**a\\|b\\*c**" in text and "<b>" not in text.replace("\\<b\\>", "")


def test_json_holds_measured_and_printed_values(make_run):
    content = json.loads(reproduce("1", [make_run("a", GEMMA)]).model_dump_json())
    line = next(ln for ln in content["blocks"][0]["lines"] if ln["name"] == "learned+veto")
    assert line["cells"]["Edit ref."]["value"] == pytest.approx(12.5)
    assert line["paper"][0]["cells"]["Edit ref."] == "4.0 [2.6, 6.1]"


def test_no_model_is_loaded():
    for path in Path(paving.reproduce.__file__).parent.glob("*.py"):
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        imported = {n.module for n in tree if isinstance(n, ast.ImportFrom)}
        assert not {m for m in imported if m.startswith(("paving.backbone", "paving.controller", "paving.training"))}, path


def test_a_plan_is_what_the_made_up_run_says(make_run):
    run = load_run(make_run("a"))
    assert isinstance(LEARNED, Plan) and run.row("learned").labels[HARMFUL][Label.HARMFUL] == 12
    assert {b: len(v) for b, v in run.verdicts("base").items()} == dict(zip(Bucket, SIZES, strict=True))
