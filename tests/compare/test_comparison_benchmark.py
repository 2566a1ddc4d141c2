"""What the comparison benchmark keeps of a run: the same tables as from the run itself, without prompt or answer."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from stand_in import stand_in

from paving.compare import compare
from paving.reproduce import load_run, settings
from paving.reproduce.runs import Setting
from paving.steering.checks import SteeringError
from tiny_runs import WordJudge


def refusing(_shop):
    raise SteeringError("made up to fail")


@pytest.fixture
def compared(setting, evaluated, tmp_path):
    folder = shutil.copytree(evaluated, tmp_path / "tiny-seed0")
    table = (stand_in("one"), stand_in("two", refusing))
    compare(folder, setting[1], judge=WordJudge(), table=table, objectives=("two", "three"))
    return folder


def test_kept_counts_give_the_runs_own_table_and_hold_no_text(script, setting, compared, tmp_path):
    bench = script("comparison")
    run = load_run(compared)
    path = tmp_path / "kept" / "tiny-seed0.json"
    bench.keep(bench.kept_of(run, 61.0), path)
    kept = bench.kept_run(path)
    live, again = settings([run])[0], settings([kept])[0]
    wanted = {
        name: {column: cell.lines for column, cell in row.items()}
        for name, row in bench.pooled(live).items()
    }  # fmt: skip
    assert {name: {c: cell.lines for c, cell in row.items()} for name, row in bench.pooled(again).items()} == wanted
    assert wanted["one/global/control/two"]["seeds"] == ("1 of 1",) and wanted["base"]["edit success"][0].startswith("0/")
    assert kept.kept.seconds == 61.0 and "one/oracle/control" in bench.markdown(bench.pooled(again))
    text = path.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (compared / "completions" / "base.jsonl").read_text(encoding="utf-8").splitlines()]
    said = [t for row in rows for t in (row["prompt"], row["response"]) if len(t) > 8]
    assert said and not any(t in text for t in said)
    assert not any(
        str(place) in text for place in (compared.parent, Path(setting[0].model).parent, Path(setting[0].edit).parent)
    )


def test_the_command_measures_keeps_and_shows_the_same_again_without_the_run(
    script, setting, evaluated, tmp_path, monkeypatch, capsys
):
    bench = script("comparison")
    shutil.copytree(evaluated, tmp_path / "out" / "same-source-seed0")
    table = (stand_in("one", scales=(1.0,)),)
    monkeypatch.setattr(bench, "compare", partial(compare, judge=WordJudge(), table=table))
    asked = ["same-source", "--out", str(tmp_path / "out"), "--kept", str(tmp_path / "kept"), "--seeds", "0"]
    bench.main(asked)
    shown = capsys.readouterr().out
    assert "| one/oracle/control/three | 1 of 1 | 1 |" in shown and "same-source-seed0, one: made up for a test" in shown
    shutil.rmtree(tmp_path / "out")
    bench.main([*asked, "--finished"])
    assert capsys.readouterr().out == shown
    with pytest.raises(SystemExit, match=r"same-source-seed0 is not there\. Run first"):
        bench.main(asked)
    with pytest.raises(SystemExit, match="nothing is measured in"):
        bench.main([*asked[:-1], "7", "--finished"])


def test_a_row_is_pooled_over_the_seeds_that_have_it_and_says_so(script, compared, tmp_path):
    bench = script("comparison")
    one, path = load_run(compared), tmp_path / "k.json"
    bench.keep(bench.kept_of(one, 1.0), path)
    found = bench.kept_run(path)
    none = found.comparison.model_copy(
        update={"choices": [c.model_copy(update={"scale": None}) for c in found.comparison.choices]}
    )
    none = none.model_copy(update={"rows": [r for r in none.rows if r.method != "one"]})
    other = bench.kept_run(path)
    object.__setattr__(other, "comparison", none)
    table = bench.pooled(Setting((found, other)))
    assert table["one/global/control/three"]["seeds"].lines == ("1 of 2",)
    assert table["one/global/control/three"]["edit success"].value is not None
    assert table["base"]["seeds"].lines == ("2 of 2",)
    nowhere = bench.pooled(Setting((other,)))["one/global/control/three"]
    assert nowhere["edit success"].missing == "no scale passes" and nowhere["seeds"].lines == ("0 of 1",)


def test_time_is_that_of_all_processes_also_of_killed_ones(script, tmp_path):
    bench = script("comparison")
    path = tmp_path / "seconds.jsonl"
    for name, ats in (("a", (1.0, 5.0)), ("b", (2.0,))):
        path.open("a").writelines(f'{{"process": "{name}", "at": {at}, "what": "x"}}\n' for at in ats)
    clock = bench.Clock(path)
    assert clock.total() == 7.0
    clock.stage("sweep", 3)
    assert 7.0 <= clock.total() < 60


def test_a_choice_of_the_runs_own_scale_is_kept_with_the_runs_own_verdicts(script, compared):
    bench, run = script("comparison"), load_run(compared)
    trained = run.row("learned+veto").scale
    taken = [
        c.model_copy(update={"scale": trained})
        if (c.method, c.variant, c.rule) == ("residual-paving", "learned+veto", "strict")
        else c
        for c in run.comparison.choices
    ]
    rows = [
        r.model_copy(update={"chosen_by": ["strict/three", "strict/two"]}) if r.row.name == "learned+veto" else r
        for r in run.comparison.rows
    ]
    object.__setattr__(run, "comparison", run.comparison.model_copy(update={"choices": taken, "rows": rows}))
    kept = bench.kept_of(run, 1.0)
    assert kept.labels["residual-paving/learned+veto/strict/three"] == kept.labels["learned+veto"]


def test_a_method_that_no_seed_could_fit_has_a_row_that_says_why(script, compared):
    bench = script("comparison")
    table = bench.pooled(settings([load_run(compared)])[0])
    row = table["two/global/strict/three"]
    assert row["seeds"].lines == ("0 of 1",) and row["edit success"].missing == "made up to fail"


def test_a_row_is_set_beside_residual_paving_by_the_same_rule(script, compared):
    bench, tables, run = script("comparison"), script("comparison_tables"), load_run(compared)
    setting = settings([run])[0]
    for variant, own in (("global", setting.deployed), ("oracle", "oracle")):
        name = f"one/{variant}/control/three"
        ours = tables.successes(run, name).values()
        theirs = tables.successes(run, f"residual-paving/{own}/control/three").values()
        wanted = 100 * (sum(ours) / len(ours) - sum(theirs) / len(theirs))
        assert bench.pooled(setting)[name][tables.LESS_OWN].value == pytest.approx(wanted)
    without = [c for c in run.comparison.rows if "control/three" not in c.chosen_by or c.method != "residual-paving"]
    object.__setattr__(run, "comparison", run.comparison.model_copy(update={"rows": without}))
    cell = bench.pooled(settings([run])[0])["one/global/control/three"][tables.LESS_OWN]
    assert "not measured on" in cell.missing
    found = run.comparison
    choices = [c.model_copy(update={"scale": None} if c.method == "residual-paving" else {}) for c in found.choices]
    object.__setattr__(run, "comparison", found.model_copy(update={"choices": choices}))
    cell = bench.pooled(settings([run])[0])["one/global/control/three"][tables.LESS_OWN]
    assert cell.missing == "no scale of Residual Paving's passes"


def test_where_a_rule_takes_no_scale_the_base_answers_and_the_seed_still_counts(script, compared, tmp_path):
    bench, tables, path = script("comparison"), script("comparison_tables"), tmp_path / "k.json"
    bench.keep(bench.kept_of(load_run(compared), 1.0), path)
    having, lacking = bench.kept_run(path), bench.kept_run(path)
    rows = [r for r in lacking.comparison.rows if r.method != "one"]
    object.__setattr__(lacking, "comparison", lacking.comparison.model_copy(update={"rows": rows}))
    name = "one/global/control/three"
    unmeasured = bench.pooled(Setting((having, lacking)))[name]
    assert "not measured on" in unmeasured[tables.EVERY_SEED].missing, "a seed that was never measured is no failure"
    assert "not measured on" in unmeasured[tables.LESS_OWN].missing
    nowhere = [c.model_copy(update={"scale": None} if c.method == "one" else {}) for c in lacking.comparison.choices]
    object.__setattr__(lacking, "comparison", lacking.comparison.model_copy(update={"choices": nowhere}))
    row = bench.pooled(Setting((having, lacking)))[name]
    ours, base = (sum(tables.successes(run, name).values()) for run in (having, lacking))
    n = len(tables.successes(having, name))
    assert base == sum(tables.successes(lacking, "base").values())
    assert row[tables.EVERY_SEED].value == pytest.approx(100 * (ours + base) / (2 * n))
    assert row["seeds"].lines == ("1 of 2",) and row["edit success"].value == pytest.approx(100 * ours / n)


def test_a_capacity_control_is_swept_by_the_same_rules_and_stands_in_the_table(
    script, setting, evaluated, tmp_path, monkeypatch, capsys
):
    bench, out = script("comparison"), tmp_path / "out"
    shutil.copytree(evaluated, out / "same-source-seed0")
    shutil.copytree(evaluated, out / "ablations" / "same-source-seed0" / "low-rank")
    monkeypatch.setattr(bench, "compare", partial(compare, judge=WordJudge(), table=(stand_in("one", scales=(1.0,)),)))
    bench.main(["same-source", "--out", str(out), "--kept", str(tmp_path / "kept"), "--seeds", "0"])
    shown = capsys.readouterr().out
    assert "| low-rank: learned+veto/control/three | 1 of 1 |" in shown and "| low-rank: oracle/control/two |" in shown
    kept = bench.kept_run(tmp_path / "kept" / "same-source-seed0-low-rank.json")
    assert {c.method for c in kept.comparison.choices} == {"residual-paving"}  # and no comparator was fitted for it


def test_a_note_of_the_time_that_was_cut_off_costs_itself_alone(script, tmp_path):
    bench, path = script("comparison"), tmp_path / "seconds.jsonl"
    path.write_text('{"process": "a", "at": 5.0, "what": "x"}\n{"process": "a", "at": 7', encoding="utf-8")
    clock = bench.Clock(path)
    clock.note("done")
    assert 5.0 <= clock.total() < 60


def test_the_picture_and_one_rules_table_are_of_all_seeds(script, compared, tmp_path, monkeypatch, capsys):
    bench = script("comparison")
    kept = bench.kept_of(load_run(compared), 1.0)
    for seed in (0, 1):
        config = kept.config.model_copy(
            update={"split_seed": seed, "training": kept.config.training.model_copy(update={"seed": seed})}
        )
        other = kept.model_copy(update={"config": config, "metrics": kept.metrics.model_copy(update={"seed": seed})})
        bench.keep(other, tmp_path / f"same-source-seed{seed}.json")
    asked = ["same-source", "--kept", str(tmp_path), "--seeds", "0", "1", "--finished", "--rule", "control/three"]
    bench.main([*asked, "--brief", "--picture", str(tmp_path / "pooled.png")])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert any(line.startswith("| one/oracle |") for line in table) and any(line.startswith("| base |") for line in table)
    assert not any("strict" in line or "/two" in line for line in table)
    assert "| harmful drift |" in table[0] and "chrF" not in table[0]
    assert (tmp_path / "pooled.png").read_bytes().startswith(b"\x89PNG")


def test_marks_of_the_picture_are_pooled_counts(script, compared, tmp_path):
    """Two runs that differ: in one the rule takes no scale, so that the base answers there."""
    bench, tables, picture = script("comparison"), script("comparison_tables"), script("comparison_picture")
    path, name = tmp_path / "k.json", "one/global/control/three"
    bench.keep(bench.kept_of(load_run(compared), 1.0), path)
    having, lacking = bench.kept_run(path), bench.kept_run(path)
    changed = {
        "rows": [r for r in lacking.comparison.rows if r.method != "one"],
        "choices": [c.model_copy(update={"scale": None} if c.method == "one" else {}) for c in lacking.comparison.choices],
    }
    object.__setattr__(lacking, "comparison", lacking.comparison.model_copy(update=changed))
    found = picture.pooled_comparison(Setting((having, lacking)))
    (mark,) = [r for r in found.rows if r.row.name == name]
    ours, base = (sum(tables.successes(run, name).values()) for run in (having, lacking))
    n = len(tables.successes(having, name))
    assert (mark.edit_success.k, mark.edit_success.n) == (ours + base, 2 * n)
    drift = having.row(name).harmful_drift
    assert mark.row.harmful_drift == pytest.approx(drift / 2), "the base has no drift of its own"
    paired = mark.row.against_base["harmful_keep"]
    assert paired.low <= mark.row.harmful_drift <= paired.high
    assert {r.row.name for r in found.rows if r.method == "none"} == {"base"}
