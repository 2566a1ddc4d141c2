"""Residual Paving's experts behind the comparators' probe: another gate, the same editor."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import pytest

from paving.compare import compare
from paving.compare.bench import open_bench
from paving.compare.own import BehindProbe, own_variants
from paving.controller.gates import Oracle
from paving.generation import generate
from paving.intervention import Identity, RowState
from paving.prompts.types import Bucket
from paving.report.comparison import finding
from paving.steering.routing import Labelled
from tiny_runs import WordJudge


@pytest.fixture(scope="module")
def bench(setting, evaluated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("behind") / "run"
    shutil.copytree(evaluated, folder)
    return open_bench(folder, setting[1], WordJudge())


@dataclass(frozen=True)
class Shut:
    name: str = "shut"

    def route(self, backbone, batch):
        return tuple(RowState(gate=0.0) for _ in batch.ids)


def test_behind_a_routing_by_labels_it_is_the_oracle(bench):
    prompts, decoding = bench.held_out[:6] + bench.held_out[-6:], bench.config.decoding
    assert {p.bucket for p in prompts} >= {Bucket.EDIT, Bucket.HARMFUL_KEEP}
    oracle = generate(bench.backbone, prompts, bench.controller.with_policy(Oracle()), decoding)
    behind = generate(bench.backbone, prompts, BehindProbe("x", bench.controller, Labelled), decoding)
    assert [c.response for c in behind] == [c.response for c in oracle]
    assert [c.gate for c in behind] == [float(p.bucket is Bucket.EDIT) for p in prompts]


def test_behind_a_gate_that_is_shut_it_is_the_base(bench):
    prompts, decoding = bench.held_out[:6], bench.config.decoding
    base = generate(bench.backbone, prompts, Identity(), decoding)
    shut = generate(bench.backbone, prompts, BehindProbe("x", bench.controller, Shut), decoding)
    assert [c.response for c in shut] == [c.response for c in base]


def test_it_is_swept_and_chosen_beside_the_runs_own_gate_and_does_not_stand_for_it(bench, setting):
    assert own_variants(bench) == ("learned+veto", "probe", "oracle")
    found = compare(bench.folder, setting[1], judge=WordJudge(), methods=["residual-paving"])
    assert {c.variant for c in found.choices} == {"learned+veto", "probe", "oracle"}
    row = next(r for r in found.rows if r.method == "residual-paving" and r.variant == "probe")
    assert row.row.policy == "probe" and row.chosen_by
    assert "Residual Paving (learned+veto" in finding(found) and "Residual Paving (probe" not in finding(found)
