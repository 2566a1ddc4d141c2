"""What stands beside a comparison's rates: how near edit answers are to their targets, and how well the probe ranks."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
from stand_in import stand_in

from paving.compare import compare, held_out
from paving.compare.bench import open_bench
from paving.prompts.types import Bucket
from paving.training.prepare import boundary_matrix
from tiny_runs import WordJudge


@pytest.fixture(scope="module")
def done(setting, evaluated, tmp_path_factory):
    """(folder, its comparison)"""
    folder = tmp_path_factory.mktemp("beside") / "run"
    shutil.copytree(evaluated, folder)
    table = [stand_in(scales=(1.0,))]
    return folder, compare(folder, setting[1], judge=WordJudge(), table=table, variants=["probe"])


@pytest.fixture(scope="module")
def bench(setting, done):
    return open_bench(done[0], setting[1], WordJudge())


def test_edit_answers_are_read_beside_their_targets_as_far_as_these_go(done, bench, monkeypatch):
    _, found = done
    edit = [p for p in bench.held_out if p.bucket is Bucket.EDIT]
    assert all(r.target.n == len(edit) for r in found.rows)
    seen = {}
    monkeypatch.setattr(
        held_out, "target_similarity", lambda answers, targets: seen.update(answers=answers, targets=targets)
    )
    targets = {p.id: (15, 16, 17) for p in edit[:2]}
    monkeypatch.setitem(bench.__dict__, "held_out_targets", targets)
    words = bench.backbone.tokenizer.decode([20, 21, 22, 23, 24])
    completions = {p.id: SimpleNamespace(bucket="edit", response=words) for p in edit}
    held_out.to_the_point(bench, held_out.Answered(completions, {}))
    assert seen["targets"] == [bench.backbone.tokenizer.decode([15, 16, 17])] * 2
    assert seen["answers"] == [bench.backbone.tokenizer.decode([20, 21, 22])] * 2


def test_the_table_says_how_well_the_comparators_probe_ranks(done, bench):
    _, found = done
    (note,) = [n for n in found.notes if n.startswith("AUC of held-out")]
    assert "the run's own gate" in note
    edit, harmful = (
        bench.probe.edit.margin(boundary_matrix(bench.backbone, prompts, bench.controller.config)).tolist()
        for prompts in ([p for p in bench.held_out if p.bucket is b] for b in (Bucket.EDIT, Bucket.HARMFUL_KEEP))
    )
    above = [a > b for a in edit for b in harmful]
    assert bench.probe_auc() == pytest.approx(sum(above) / len(above))
