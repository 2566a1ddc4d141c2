"""`paving diagnose` on a tiny run: what it measures, that it agrees with the run's own rows, and what the report shows."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from paving import run as runs
from paving.diagnose import DEFAULT_PARTS, FILE, PARTS, Grid, Options, diagnose, story
from paving.diagnose import cells as cells_module
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
    first, last = found.corruption.points[0], found.corruption.points[-1]
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
    assert found.trajectory.edit.n + found.trajectory.n_closed + found.trajectory.n_short == n
    layers = json.loads((folder / "controller" / "controller.json").read_text())["config"]["edit_layers"]
    assert [a.layer for a in found.trajectory.layers] == list(layers)
    assert set(found.trajectory.paths) == {b.value for b in Bucket}
    name = "learned" if found.trajectory.paths["edit"].blocked is None else "learned+veto"
    deployed = next(r for r in metrics.rows if r.name == name)
    for bucket, path in found.trajectory.paths.items():
        assert path.active == deployed.gate_active[bucket]
        assert path.path_rms.n == deployed.gate_active[bucket].n


def test_a_probe_stands_at_every_layer_and_late_refusals_at_every_row(run):
    _, metrics, found, _ = run
    assert [p.layer for p in found.probes.layers] == list(range(6))
    assert {r.row for r in found.late} == {r.name for r in metrics.rows}
    assert all(r.share.n >= r.share.k and r.n_long == 0 for r in found.late)  # answers of six tokens are never longer


def test_the_report_shows_it_and_a_second_evaluation_keeps_it(run):
    folder, _, found, means = run
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert "A router made worse on purpose" in source and found.corruption.conclusion.split(":")[0] in source
    runs.evaluate(folder, means, judge=WordJudge(), policies=["open"])
    assert "A router made worse on purpose" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_damaged_file_is_named_with_its_mend(run, tmp_path):
    (tmp_path / "diagnostics.json").write_text("{}")
    with pytest.raises(RunError, match="Diagnose again: paving diagnose"):
        runs.diagnostics_of(tmp_path)


def test_the_default_measures_all_but_the_grid_and_says_so(run):
    _, _, found, _ = run
    assert set(found.keys) == set(DEFAULT_PARTS) == set(PARTS) - {"grid"}
    assert found.skipped == {"grid": "not asked for; measure it with: paving diagnose RUN --only grid"}
    assert all(getattr(found, p) is not None for p in DEFAULT_PARTS) and found.grid is None


@pytest.fixture
def no_report(monkeypatch):
    """Drawing the page takes seconds, and is tested elsewhere."""
    monkeypatch.setattr(story, "report", lambda _folder: None)


def test_a_second_diagnosis_measures_nothing_and_a_named_part_again_only_when_asked(run, monkeypatch, no_report):
    folder, _, found, means = run
    before = (folder / "diagnostics" / "answers.jsonl").read_bytes()
    said = []
    means = replace(means, say=said.append)
    assert diagnose(folder, means, WordJudge()) == found
    assert len(said) == len(DEFAULT_PARTS) and all("kept from" in text for text in said)
    monkeypatch.setattr(cells_module, "_measure", lambda *_: pytest.fail("a kept cell was measured again"))
    again = diagnose(folder, means, WordJudge(), Options(only=("late", "experts"), again=True))
    assert again.model_copy(update={"seconds": found.seconds}) == found
    assert (folder / "diagnostics" / "answers.jsonl").read_bytes() == before


def test_an_interrupted_diagnosis_keeps_the_parts_that_were_finished(run, tmp_path, monkeypatch):
    monkeypatch.setattr(story, "report", lambda _folder: None)
    folder, _, found, means = run
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "diagnostics")
    (copy / FILE).unlink()
    measure = cells_module._measure
    monkeypatch.setattr(cells_module, "_measure", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        diagnose(copy, means, WordJudge())
    kept = Diagnostics.model_validate_json((copy / FILE).read_text(encoding="utf-8"))
    assert set(kept.keys) == set(DEFAULT_PARTS) - {"experts"}
    monkeypatch.setattr(cells_module, "_measure", measure)
    said = []
    finished = diagnose(copy, replace(means, say=said.append), WordJudge())
    assert len(said) == len(DEFAULT_PARTS) - 1
    assert finished.model_copy(update={"seconds": found.seconds}) == found


def _interrupt(*_):
    raise KeyboardInterrupt


def test_another_judge_takes_no_part_over(run, tmp_path, no_report):
    folder, _, _, means = run
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    other = diagnose(copy, means, WordJudge(name="another"), Options(only=("late",)))
    assert set(other.keys) == {"late"} and other.judge == "another" and "experts" in other.skipped


def test_cells_are_rows_of_the_three_way_table(run, no_report):
    """The router's mixture at the deployed point is the deployed row; the oracle's cell leaves every keep alone."""
    folder, metrics, found, means = run
    rows = {r.name: r for r in metrics.rows}
    whole = next(c for c in found.experts.cells if c.mixture == "router")
    deployed = rows["learned+veto" if whole.use_veto else "learned"]
    assert whole.row.refusal == deployed.refusal and whole.row.gate_active == deployed.gate_active
    for bucket, score in deployed.preservation.items():
        assert whole.row.preservation[bucket].value == pytest.approx(score.value, abs=1e-5)
    assert {c.mixture for c in found.experts.cells} == {
        "router", "uniform", *(f"{kind}:{k}" for kind in ("expert", "without") for k in range(3)),
    }  # fmt: skip
    grid = Grid(policies=("oracle", "open"), mixtures=("router",), factors=(1.0, 2.0), prompts=3)
    block = diagnose(folder, means, WordJudge(), Options(only=("grid",), grid=grid)).grid
    assert set(block.prompts.values()) == {3} and len(block.cells) == 4
    for c in block.cells:
        active = c.row.gate_active[Bucket.HARMFUL_KEEP]
        assert (active.k, active.n) == (0 if c.policy == "oracle" else 3, 3)
        if c.policy == "oracle":
            assert c.row.preservation[Bucket.HARMFUL_KEEP].value == 1.0 and c.row.harmful_drift == 0.0


def test_the_raw_route_is_calibrated_as_the_run_says_and_the_veto_ties_at_its_own_threshold(run):
    _, metrics, found, _ = run
    raw = found.route.routes[0]
    assert raw.brier == pytest.approx(metrics.router.brier, abs=1e-5)
    assert raw.ece == pytest.approx(metrics.router.ece, abs=1e-4)
    assert found.route.routes[-1].name == "oracle" and found.route.routes[-1].accuracy.rate == 1.0
    high, low = found.route.vetoes
    assert low.threshold <= high.threshold + 1e-6
    assert all(low.vetoed[b].k >= high.vetoed[b].k for b in Bucket)
    if metrics.router.veto_threshold is not None:
        assert high.threshold == pytest.approx(metrics.router.veto_threshold)


def test_norms_stand_at_every_layer_and_begin_where_the_edit_begins(run):
    _, _, found, _ = run
    first = min(found.norms.edited_layers)
    for record in found.norms.layers:
        assert (record.share_open > 0) == (record.layer >= first)
        assert record.share_deployed <= record.share_open + 1e-6
    assert len(found.norms.layers) == 6 * 3


def test_usefulness_has_every_row_its_yardstick_and_the_targets(run):
    _, metrics, found, _ = run
    by_name = {(a.row, a.bucket): a for a in found.usefulness.answers}
    assert {(r.name, "edit") for r in metrics.rows} | {("base", "benign_keep"), ("edit target", "edit")} == set(by_name)
    for (row, _), a in by_name.items():
        if row == "oracle":
            assert a.n == metrics.rows[0].refusal[Bucket.EDIT].n
        if a.n:
            assert a.base_perplexity is None or a.base_perplexity >= 1.0
    assert by_name["base", "benign_keep"].rouge_l is None
    assert any("--bert-score" in note for note in found.usefulness.notes)


@pytest.mark.parametrize(
    "options, message",
    [
        (Options(only=("lateness",)), "'lateness' is no part of a diagnosis; there are: late, route"),
        (Options(only=()), "no part was named"),
        (Options(grid=Grid(policies=("often",))), "gate policy 'often' is not known"),
        (Options(grid=Grid(mixtures=("best",))), "mixture 'best' is not known"),
        (Options(grid=Grid(factors=(0.0,))), "a scale factor is a positive number; got 0.0"),
    ],
)
def test_a_wrong_option_is_refused_before_a_model_is_loaded(run, options, message):
    folder, _, _, means = run

    class NoModel(type(means)):
        def load(self, *_):
            raise AssertionError("a model was loaded")

    with pytest.raises(ValueError, match=message):
        diagnose(folder, NoModel(**vars(means)), WordJudge(), options)


def test_a_text_that_the_evaluation_judged_is_not_judged_again(run, tmp_path):
    folder, _, found, means = run
    shutil.copytree(folder, tmp_path / "run")

    class Forgetful(WordJudge):
        """Of the same name, but of another mind now: only texts that nobody judged before may be asked for."""

        def judge(self, prompt, response, bucket, *, truncated=False):
            asked.append((prompt, response))
            return super().judge(prompt, response, bucket, truncated=truncated)

    asked: list[tuple[str, str]] = []
    again = diagnose(tmp_path / "run", means, Forgetful(), Options(only=["corruption"], again=True))
    assert again.corruption == found.corruption and asked == []
