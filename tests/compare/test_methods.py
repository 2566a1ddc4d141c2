"""The table of methods: every entry is fitted on a run's own material and measured."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from stand_in import AddAt, stand_in

from paving.backbone import BackboneError, render_batch
from paving.compare import compare
from paving.compare.bench import open_bench
from paving.compare.fitting import Fitting
from paving.compare.methods import METHODS
from paving.compare.workshop import Workshop
from paving.prompts.types import Bucket, SplitName
from paving.steering.checks import SteeringError
from paving.steering.dim import DimConfig, fit_dim
from paving.steering.rdo import RDOConfig
from paving.steering.routing import Labelled
from paving.training.prepare import boundary_matrix, silent
from paving.training.promise import PromiseConfig, promises
from tiny_material import REFUSAL_FIRST, tiny_material
from tiny_models import logits_of, tiny_backbone
from tiny_runs import WordJudge


@pytest.fixture(scope="module")
def shop():
    backbone = tiny_backbone()
    return Workshop(backbone, tiny_material(backbone), silent, lambda _line: None)


def every_other(shop) -> dict[str, float]:
    """The tiny base refuses nothing by its first token, and WRMD needs prompts of both kinds."""
    prompts = (*shop.material.splits.train, *shop.material.splits.calibration)
    return {p.id: 0.9 if i % 2 else 0.1 for i, p in enumerate(prompts)}


def test_every_entry_is_measured(setting, evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr("paving.compare.methods.RDOConfig", lambda: RDOConfig(steps=3, batch_size=4, check_every=3))
    _, means = setting
    monkeypatch.setattr(Workshop, "refusal_confidence", property(every_other))
    monkeypatch.setattr(Workshop, "_refused", lambda self, b: list(self.material.of(SplitName.CALIBRATION, b)))
    shutil.copytree(evaluated, tmp_path / "run")
    said = []
    found = compare(tmp_path / "run", replace(means, say=said.append), judge=WordJudge())
    measured = {r.method for r in found.rows}
    assert measured >= {m.name for m in METHODS}
    told = {m.name: m.note for m in found.methods}
    assert "published limit" in told["dim-ablation"] and "published limit" in told["rdo"]
    assert any("non-target concepts" in note for r in found.rows if r.method == "repit" for note in r.notes)
    assert all("block " in told[name] for name in ("caa", "caa-mean", "act-add"))
    assert {r.variant for r in found.rows if r.method == "cast"} == {"global", "probe", "probe+veto", "oracle", "own"}


def test_what_several_methods_begin_with_is_searched_once_also_where_there_is_none(shop, monkeypatch):
    calls = []

    def searched(*args, **kwargs):
        calls.append(1)
        return fit_dim(*args[:2], DimConfig(kl_limit=0.0), **kwargs)

    monkeypatch.setattr("paving.compare.workshop.fit_dim", searched)
    fresh = replace(shop)
    for _ in range(3):
        with pytest.raises(SteeringError, match="may be chosen"):
            _ = fresh.dim
    assert len(calls) == 1


def test_scores_are_those_of_the_first_token_under_the_edit(shop):
    edit = shop.material.of(SplitName.CALIBRATION, Bucket.EDIT)
    assert shop.refusals_begin_with.ids == REFUSAL_FIRST
    head = shop.backbone.model.get_output_embeddings().weight[list(REFUSAL_FIRST)].mean(0)
    base, towards = shop.refusal_scores(edit), shop.refusal_scores(edit, AddAt(60 * head / head.norm(), layer=5))
    assert base.keys() == {p.id for p in edit} and all(towards[i] > base[i] for i in base)
    batch = render_batch(shop.backbone, edit[:1])
    p = logits_of(shop.backbone, batch)[0, -1].double().softmax(-1)[list(REFUSAL_FIRST)].sum()
    assert base[edit[0].id] == pytest.approx((p / (1 - p)).log().item(), abs=1e-3)
    assert shop.refusal_confidence[edit[0].id] == pytest.approx(p.item(), rel=1e-3)


def test_shares_are_of_what_the_base_refuses(shop, monkeypatch):
    """Harmful keeps that the base answers anyway are no success of an edit."""

    def scores(self, prompts, editor=None):
        if editor is None:
            return {p.id: 1.0 if i % 7 else -1.0 for i, p in enumerate(prompts)}  # the base refuses all but the first
        return {p.id: -1.0 if p.bucket is Bucket.EDIT or i == 0 else 1.0 for i, p in enumerate(prompts)}

    monkeypatch.setattr(Workshop, "refusal_scores", scores)
    assert shop.no_longer_refused(AddAt(None)) == (1.0, 1 / 6)
    monkeypatch.setattr(Workshop, "refusal_scores", lambda _self, prompts, editor=None: {p.id: -1.0 for p in prompts})
    with pytest.raises(SteeringError, match="no refusal of the calibration's edit prompts begins as those"):
        shop.no_longer_refused(AddAt(None))


def test_a_method_that_cannot_be_fitted_is_na_with_its_reason_and_the_others_stand(setting, evaluated, tmp_path):
    """Also where the model is the reason: orthogonalisation of blocks with a norm behind their projections, say."""
    _, means = setting
    shutil.copytree(evaluated, tmp_path / "run")

    def refusing(shop):
        raise BackboneError("a norm stands between")

    table = (stand_in("broken", refusing), stand_in("whole"))
    found = compare(tmp_path / "run", means, judge=WordJudge(), table=table)
    assert {r.method for r in found.rows} >= {"whole"} and "broken" not in {r.method for r in found.rows}
    assert next(m.failed for m in found.methods if m.name == "broken") == "a norm stands between"
    assert any(n.startswith("broken could not be fitted, so it is n/a: a norm stands between") for n in found.notes)
    again = compare(tmp_path / "run", means, judge=WordJudge(), table=table, methods=["whole"], variants=["oracle"])
    assert [m for m in again.methods if m.failed] == [m for m in found.methods if m.failed]  # asking for another keeps it
    assert [n for n in again.notes if "broken" in n] == [n for n in found.notes if "broken" in n]


def test_a_fit_has_gradients_also_where_whoever_asks_has_none(setting, evaluated, tmp_path):
    """A resumed comparison may fit first inside a measurement of preservation."""
    _, means = setting

    def trained(shop):
        weight = torch.ones(shop.backbone.d_model, requires_grad=True)
        weight.sum().backward()
        return AddAt(weight.grad)

    fitting = Fitting(stand_in("trained", trained), open_bench(evaluated, means, WordJudge()))
    with torch.no_grad():
        assert torch.equal(fitting.editor.vector, torch.ones(32))


def test_a_methods_own_condition_is_fitted_once_for_all_comparisons(setting, evaluated, tmp_path, monkeypatch):
    """Which prompts it opens on is kept; also what the probe opens on, which is the same for every method."""
    _, means = setting
    shutil.copytree(evaluated, tmp_path / "run")
    own = {"own": lambda editor: Labelled(), "variants": ("probe", "own"), "scales": (1.0,)}
    first = compare(tmp_path / "run", means, judge=WordJudge(), table=(stand_in("conditional", **own),))
    assert {r.variant for r in first.rows if r.method == "conditional"} <= {"probe", "own"}
    monkeypatch.setattr("paving.compare.bench.fit_probe", lambda *_: pytest.fail("fitted again"))
    unfit = stand_in("conditional", lambda _shop: pytest.fail("fitted again"), **own)
    assert compare(tmp_path / "run", means, judge=WordJudge(), table=(unfit,)) == first
    path = tmp_path / "run" / "comparison" / "decisions" / "probe.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(pytest.fail.Exception, match="fitted again"):
        compare(tmp_path / "run", means, judge=WordJudge(), table=(unfit,))


def test_the_probe_keeps_the_promise_that_the_run_makes(setting, evaluated, tmp_path):
    _, means = setting
    shutil.copytree(evaluated, tmp_path / "run")
    found = open_bench(tmp_path / "run", means, WordJudge())
    promise = PromiseConfig(harmful=0.4, delta=0.4)
    calibration = found.config.calibration.model_copy(update={"promise": promise, "policies": ("hard",)})
    bound = replace(found, config=found.config.model_copy(update={"calibration": calibration}))
    assert bound.probe.edit.threshold >= found.probe.edit.threshold
    prompts = found.splits.of(SplitName.CALIBRATION)
    logits = bound.probe.edit.margin(boundary_matrix(found.backbone, prompts, found.controller.config))
    (made,) = promises(logits.tolist(), prompts, promise)
    opened = [p.id for p, x in zip(prompts, logits.tolist(), strict=True) if x > bound.probe.edit.threshold]
    assert len([p for p in prompts if p.bucket is Bucket.HARMFUL_KEEP and p.id in opened]) <= made.allowed
    assert bound.routing_key("probe") != found.routing_key("probe") and bound.routing_key("global") == "global"
