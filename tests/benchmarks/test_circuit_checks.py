"""The second look at finished circuit runs: what is pooled, what is told by seed, and what is shown without the runs."""

from __future__ import annotations

import pytest


def counts(refused, n=100):
    return {"xstest, safe": (refused, 0, n), "alpaca": (0, 1, n)}


def test_benign_refusals_are_pooled_by_category_and_told_by_seed(script):
    checks = script("circuit_checks")
    runs = {f"crime_planning-seed{s}-selective": counts(k) for s, k in enumerate((10, 20))}
    runs["hate_speech-seed0-selective"] = counts(40)
    lines = checks.benign_table(checks.Kept(benign={"base": counts(1), **runs}))
    table = {line.split(" | ")[0].strip("| "): line for line in lines[2:]}
    assert list(table) == ["base", "crime_planning", "hate_speech", "all"]
    assert "| 2 | 15.0 [" in table["crime_planning"] and "(10.0, 20.0)" in table["crime_planning"]
    assert "(25.0, 20.0)" in table["all"]  # each seed over the categories that it has
    assert checks.wilson(15, 100).low == pytest.approx(
        float(table["crime_planning"].split("[")[1].split(",")[0]) / 100, abs=6e-4
    )


def test_both_rules_stand_beside_each_other_and_a_published_runs_base_is_not_counted_twice(script):
    checks = script("circuit_checks")

    def sides(k):
        return {side: {"harmful": (k, 10), "benign": (k - 1, 10)} for side in ("category", "benign")}

    rules = {
        f"hate_speech-seed0-{r}": {"base": sides(1), checks.EDIT: sides(k)} for r, k in (("published", 2), ("selective", 6))
    }
    lines = checks.rules_table(checks.Kept(rules=rules))
    assert "| base | 1 | 10.0 / 0.0 | 10.0 / 0.0 |" in lines
    assert f"| {checks.EDIT}, selective | 1 | 60.0 / 50.0 | 60.0 / 50.0 |" in lines
    assert f"| {checks.EDIT}, published | 1 | 20.0 / 10.0 | 20.0 / 10.0 |" in lines


def test_what_is_kept_is_shown_without_runs_and_a_folder_without_any_says_what_to_run(script, tmp_path, capsys):
    checks, kept = script("circuit_checks"), tmp_path / "kept.json"
    asked = ["--data", str(tmp_path), "--runs", str(tmp_path / "none"), "--kept", str(kept)]
    with pytest.raises(SystemExit, match=r"no finished run is in .*Run first"):
        checks.main(asked)
    checks.keep(checks.Kept(benign={"base": counts(1)}), kept)
    assert checks.main([*asked, "--finished"]) == 0
    assert "| base | 1 | 1.0 [" in capsys.readouterr().out
