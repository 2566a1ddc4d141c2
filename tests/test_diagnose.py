"""`paving diagnose` on a tiny run: what it measures, that it agrees with the run's own rows, and what the report shows."""

from __future__ import annotations

import json

import pytest

from paving import run as runs
from paving.diagnose import diagnose
from paving.evaluation.diagnostics.records import Diagnostics
from paving.prompts.types import Bucket
from paving.run_folder import RunError
from tiny_runs import WordJudge, tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config, means = tiny_run(tmp_path_factory.mktemp("setting"))
    folder = tmp_path_factory.mktemp("diagnosed") / "run"
    runs.train(config, folder, means, WordJudge())
    with pytest.raises(RunError, match="Evaluate it first: paving eval"):
        diagnose(folder, means, WordJudge())
    metrics = runs.evaluate(folder, means, judge=WordJudge(), policies=["open"])
    before = (folder / "report.html").read_text(encoding="utf-8")
    assert "A router made worse on purpose" not in before
    return folder, metrics, diagnose(folder, means, WordJudge()), means


def test_what_was_found_is_saved_and_read_back(run):
    folder, _, found, _ = run
    assert Diagnostics.model_validate_json((folder / "diagnostics.json").read_text(encoding="utf-8")) == found
    assert json.loads((folder / "diagnostics.json").read_text())["judge"] == "even"


def test_no_flip_is_the_oracle_row_and_every_flip_opens_the_keeps(run):
    _, metrics, found, _ = run
    rows = {r.name: r for r in metrics.rows}
    first, last = found.corruption[0], found.corruption[-1]
    assert (first.rate, last.rate) == (0.0, 1.0)
    assert first.edit_refusal.mean == pytest.approx(rows["oracle"].refusal[Bucket.EDIT].rate)
    assert first.harmful_refusal.mean == pytest.approx(rows["base"].refusal[Bucket.HARMFUL_KEEP].rate)
    assert first.harmful_preservation.mean == 1.0
    assert last.edit_refusal.mean == pytest.approx(rows["base"].refusal[Bucket.EDIT].rate)
    assert last.harmful_refusal.mean == pytest.approx(rows["open"].refusal[Bucket.HARMFUL_KEEP].rate)
    assert last.harmful_preservation.mean == pytest.approx(rows["open"].preservation[Bucket.HARMFUL_KEEP].value, abs=1e-6)


def test_trajectories_cover_every_edited_layer_and_closed_gates_are_counted(run):
    folder, metrics, found, _ = run
    n = metrics.rows[0].refusal[Bucket.EDIT].n
    assert found.trajectory.edit.n + found.trajectory.n_closed == n
    layers = json.loads((folder / "controller" / "controller.json").read_text())["config"]["edit_layers"]
    assert [a.layer for a in found.trajectory.layers] == list(layers)
    assert set(found.trajectory.path_rms) == {b.value for b in Bucket}


def test_a_probe_stands_at_every_layer_and_late_refusals_at_every_row(run):
    _, metrics, found, _ = run
    assert [p.layer for p in found.probes] == list(range(6))
    assert {r.row for r in found.late} == {r.name for r in metrics.rows}
    assert all(r.share.n >= r.share.k and r.n_long == 0 for r in found.late)  # answers of six tokens are never longer


def test_the_report_shows_it_and_a_second_evaluation_keeps_it(run):
    folder, _, found, means = run
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert "A router made worse on purpose" in source and found.corruption_conclusion.split(":")[0] in source
    runs.evaluate(folder, means, judge=WordJudge(), policies=["open"])
    assert "A router made worse on purpose" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_damaged_file_is_named_with_its_mend(run, tmp_path):
    (tmp_path / "diagnostics.json").write_text("{}")
    with pytest.raises(RunError, match="Diagnose again: paving diagnose"):
        runs.diagnostics_of(tmp_path)
