"""A whole run on a tiny saved model: what a run folder holds, that a second command goes on, that nothing is overwritten."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from paving import generation
from paving import run as runs
from paving.ablations import run_ablation
from paving.backbone import chat
from paving.controller.config import ControllerConfig
from paving.controller.paved_model import PavedModel
from paving.evaluation.judges import Label, Verdict
from paving.generation import load_completions
from paving.prompts.types import Bucket
from paving.router_search import search_router
from paving.run_folder import RunError
from paving.run_splits import recorded_split, split_of
from paving.training.checkpoint import TrainingError
from paving.training.gate_search import GateSearch
from tiny_runs import WordJudge, tiny_run


@dataclass(frozen=True)
class NothingRefused:
    name: str = "none"

    def judge(self, prompt, response, bucket, *, truncated=False):
        return Verdict(Label.HARMLESS_BENIGN, "none")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def finished(setting, tmp_path_factory):
    config, means = setting
    folder = tmp_path_factory.mktemp("finished") / "run"
    runs.train(config, folder, means, WordJudge())
    return folder, runs.evaluate(folder, means, judge=WordJudge(), policies=["open"])


def test_a_run_folder_holds_everything_that_a_reader_needs(finished):
    folder, metrics = finished
    expected = "config.json environment.json prompts.json splits.json calibration.json metrics.json report.html"
    assert all((folder / name).exists() for name in expected.split())
    assert [r.name for r in metrics.rows] == ["base", "learned", "learned+veto", "open", "oracle"]
    for row in metrics.rows:
        assert (folder / "completions" / f"{row.name}.jsonl").exists()
        assert (folder / "verdicts" / f"{row.name}.jsonl").exists()
    ids = json.loads((folder / "splits.json").read_text())["ids"]
    assert set(ids) == {"train", "calibration", "held_out"}
    assert not list(folder.rglob("*.partial"))


def test_every_filter_is_counted_before_and_after(finished):
    _, metrics = finished
    stages = {c["filter"] for c in metrics.filters}
    assert {"base refuses (edit prompts)", "target can be used (training edit prompts)"} <= stages
    assert all(set(c) >= {"before", "after", "split"} for c in metrics.filters)


def test_oracle_routing_leaves_every_keep_as_the_base_has_it(finished):
    folder, metrics = finished
    base, oracle = (
        {c.id: c for c in load_completions(folder / "completions" / f"{name}.jsonl")} for name in ("base", "oracle")
    )
    for name, completion in oracle.items():
        if completion.bucket != Bucket.EDIT:
            assert completion.response == base[name].response and completion.gate == 0.0
    row = next(r for r in metrics.rows if r.name == "oracle")
    assert row.preservation["harmful_keep"].value == 1.0 and row.harmful_drift == 0.0


def test_further_rows_by_gate_and_mixture_share_experts_and_scale(finished, setting):
    folder, first = finished
    wanted = ["soft", "soft+veto", "thresholded", "thresholded+veto", "oracle"]
    metrics = runs.evaluate(folder, setting[1], judge=WordJudge(), policies=wanted, mixtures=["uniform", "expert:1"])
    names = [r.name for r in metrics.rows]
    # thresholded is the deployed gate, so that it stands there already as `learned`; `open` was asked for before
    further = ["open", "soft", "soft+veto", "thresholded+veto", "uniform", "expert:1"]
    assert names == ["base", "learned", "learned+veto", *further, "oracle"]
    assert [r.name for r in runs.evaluate(folder, setting[1], judge=WordJudge()).rows] == names, (
        "asking for less takes nothing away"
    )
    assert {r.scale for r in metrics.rows[1:]} == {first.rows[1].scale}
    rows = {r.name: r for r in metrics.rows}
    assert rows["soft"].veto_rate["edit"].n == 0 < rows["soft+veto"].veto_rate["edit"].n
    answers = {n: load_completions(folder / "completions" / f"{n}.jsonl") for n in ("learned+veto", "expert:1")}
    assert [c.gate for c in answers["learned+veto"]] == [c.gate for c in answers["expert:1"]]
    assert {c.mixture for c in answers["expert:1"]} == {(0.0, 1.0, 0.0)}


@pytest.mark.parametrize(
    ("policies", "mixtures", "says"),
    [(["sof"], [], "allowed: soft, hard"), (["open+veto"], [], "no veto goes with"), ([], ["expert:7"], "experts 0..2"),
     ([], ["mean"], "allowed: router, uniform")],
)  # fmt: skip
def test_a_row_that_cannot_be_is_refused_before_decoding(finished, setting, policies, mixtures, says, monkeypatch):
    monkeypatch.setattr("paving.run.filtered", lambda *a, **k: pytest.fail("went on"))
    with pytest.raises(ValueError, match=says):
        runs.evaluate(finished[0], setting[1], judge=WordJudge(), policies=policies, mixtures=mixtures)


@dataclass(frozen=True)
class OtherEngine:
    """Decodes as this process does, under another name."""

    name: str = "vllm 0"
    key: str = "vllm 0 {}"

    def generate(self, *args, **kwargs):
        return [replace(c, response=f"{c.response} w1") for c in generation.generate(*args, **kwargs)]


def test_another_engines_answers_stand_beside_the_runs_own(finished, setting, monkeypatch):
    folder, _ = finished
    own = {p: p.read_bytes() for p in [folder / "metrics.json", *folder.glob("completions/*"), *folder.glob("verdicts/*")]}
    asked = []

    @contextmanager
    def engine_of(name, _folder, _controller, _backbone, options, rows):
        asked.append((name, options, [r.name for r in rows]))
        yield OtherEngine()

    monkeypatch.setattr(runs, "engine_of", engine_of)
    metrics = runs.evaluate(folder, setting[1], judge=WordJudge(), engine="vllm", engine_options={"x": 1})
    there = folder / "engines" / "vllm"
    assert metrics.engine == "vllm 0" and asked[0][:2] == ("vllm", {"x": 1}) and asked[0][2][0] == "learned"
    assert all(c.response.endswith(" w1") for c in load_completions(there / "completions" / "base.jsonl"))
    assert "by vllm 0" in (there / "report.html").read_text(encoding="utf-8")
    assert {p: p.read_bytes() for p in own} == own
    old = folder / "judges" / "of-before"
    old.mkdir(parents=True)
    (old / "metrics.json").write_text("{}", encoding="utf-8")
    (old / "report.html").write_text("what one judge let pass", encoding="utf-8")
    monkeypatch.setattr(generation, "generate", lambda *a, **k: pytest.fail("decoded again"))
    again = runs.evaluate(folder, setting[1], judge=WordJudge(), engine="vllm")
    assert again.rows == metrics.rows  # metrics that cannot be read take none of it away, but for their own report
    assert not (old / "report.html").exists() and (folder / "report.html").exists()
    shutil.rmtree(old)


def test_an_ablation_shares_prompts_scale_and_base_answers_with_its_run(finished, setting, tmp_path, monkeypatch):
    folder, full = finished
    monkeypatch.setattr("paving.run.judge_from", lambda line, **_: WordJudge())
    decoded = []
    generate = generation.generate
    monkeypatch.setattr(generation, "generate", lambda *a, **k: decoded.append(a[2].name) or generate(*a, **k))
    metrics = run_ablation(folder, "no-contrastive", tmp_path / "variant", setting[1])
    assert "base" not in decoded and "learned" in decoded
    assert metrics.rows[0] == full.rows[0] and metrics.rows[1].scale == full.rows[1].scale
    stages = {p.stage for p in metrics.training}
    assert "contrastive" not in stages and "contrastive" in {p.stage for p in full.training}
    with pytest.raises(RunError, match="paving eval"):
        (tmp_path / "unevaluated").mkdir()
        (tmp_path / "unevaluated" / "config.json").write_text((folder / "config.json").read_text())
        run_ablation(tmp_path / "unevaluated", "no-contrastive", tmp_path / "x", setting[1])


def test_a_damaged_metrics_file_is_mended_by_evaluating_again(finished, setting, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    (folder / "metrics.json").write_text('{"rows": [')
    with pytest.raises(RunError, match="Evaluate again: paving eval"):
        runs.report(folder)
    again = runs.evaluate(folder, setting[1], judge=WordJudge())
    assert [r.name for r in again.rows] == ["base", "learned", "learned+veto", "oracle"]


def test_a_finished_run_asks_no_judge_and_a_second_judge_only_itself(finished, setting, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("paving.run.judge_from", lambda line, **_: asked.append(line) or Lenient())
    runs.train(setting[0], finished[0], setting[1])
    assert asked == []
    shutil.copytree(finished[0], tmp_path / "copy")
    runs.evaluate(tmp_path / "copy", setting[1], second_judge="hf:rubric=another")
    assert asked == ["hf:rubric=another"]


def test_preservation_looks_at_twelve_tokens_whatever_was_trained(finished, setting, monkeypatch):
    seen = []
    measure = runs.three_way
    monkeypatch.setattr(runs, "three_way", lambda *a, **k: seen.append(a[3].horizon) or measure(*a, **k))
    folder, _ = finished
    config = json.loads((folder / "config.json").read_text())
    assert config["training"]["horizon"] == 12, "the run itself is no witness"
    monkeypatch.setattr(runs, "read_config", lambda _f: setting[0].model_copy(
        update={"training": setting[0].training.model_copy(update={"horizon": 6})}))  # fmt: skip
    runs.evaluate(folder, setting[1], judge=WordJudge())
    assert seen == [12]


class Wavering(WordJudge):
    """Never the same word twice, as an endpoint without a temperature may be; it must not move the split."""

    def judge(self, prompt, response, bucket, *, truncated=False):
        return Verdict(Label.HARMLESS_BENIGN, "changed its mind")


def test_evaluating_again_keeps_the_prompts_that_training_recorded(finished, setting):
    folder, first = finished
    ids = json.loads((folder / "splits.json").read_text())["ids"]["held_out"]
    again = runs.evaluate(folder, setting[1], judge=Wavering())
    assert again.rows[0].refusal["edit"].n == first.rows[0].refusal["edit"].n == len(ids["edit"])
    assert set(json.loads((folder / "groups.json").read_text())) == {i for b in ids.values() for i in b}


def test_a_file_that_has_grown_moves_no_prompt_to_another_split(setting, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    config, _ = setting
    edit, before = Path(config.edit), Path(config.edit).read_text(encoding="utf-8")
    kept = recorded_split(config, tmp_path / "run")
    try:
        edit.write_text(before + json.dumps({"id": "new", "prompt": "w1 w2 w3 w4 w199"}) + "\n", encoding="utf-8")
        assert split_of(config).splits.ids() != json.loads((tmp_path / "run" / "splits.json").read_text())["ids"]
        assert recorded_split(config, tmp_path / "run") == kept
        first = json.loads(before.splitlines()[0])
        again = json.dumps({**first, "id": "same words"})
        edit.write_text("\n".join([before.rstrip(), again]) + "\n", encoding="utf-8")
        assert recorded_split(config, tmp_path / "run") == kept
        lines = before.splitlines()
        edit.write_text("\n".join([*lines[1:], lines[0]]) + "\n", encoding="utf-8")  # ids are numbers of lines here
        with pytest.raises(RunError, match=r"prompts that .* was made with are gone .* or say something else now"):
            runs.evaluate(tmp_path / "run", setting[1], judge=WordJudge())
    finally:
        edit.write_text(before, encoding="utf-8")


def test_a_run_behind_a_system_prompt_trains_evaluates_and_searches_behind_it(setting, tmp_path, monkeypatch):
    config = setting[0].model_copy(update={"system": "w150 w151"})
    asked = []
    real = chat.render_messages
    monkeypatch.setattr(chat, "render_messages", lambda b, messages: asked.append(messages) or real(b, messages))
    runs.train(config, tmp_path / "run", setting[1], WordJudge())
    runs.evaluate(tmp_path / "run", setting[1], judge=WordJudge())
    settings = GateSearch(layers=((1,),), poolings=("last",), kernels=("linear",), folds=2, shuffles=1)
    search_router(tmp_path / "run", tmp_path / "gate", settings, setting[1])
    assert asked and all(messages[0] == {"role": "system", "content": "w150 w151"} for messages in asked)
    assert {p.system for p in recorded_split(config, tmp_path / "run").held_out} == {"w150 w151"}
    for folder in (tmp_path / "run", tmp_path / "gate"):  # whoever loads it knows what to put before a conversation
        assert PavedModel.from_pretrained(folder / "controller", model=config.model).system == "w150 w151"
    description = tmp_path / "run" / "controller" / "controller.json"
    before = json.loads(description.read_text(encoding="utf-8"))
    del before["trained_on"]["system"]  # a run of before: its own configuration still knows
    description.write_text(json.dumps(before), encoding="utf-8")
    assert PavedModel.from_pretrained(tmp_path / "run").system == "w150 w151"
    PavedModel.from_pretrained(tmp_path / "gate").save_pretrained(tmp_path / "shared")
    assert 'to be served behind it, in these characters: "w150 w151"' in (tmp_path / "shared" / "README.md").read_text(
        encoding="utf-8"
    )
    with pytest.raises(RunError, match="belongs to another configuration"):
        runs.train(setting[0], tmp_path / "run", setting[1], WordJudge())


def test_a_run_of_before_keeps_its_prompts_by_id(setting, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run" / "splits.json"
    recorded = json.loads(path.read_text(encoding="utf-8"))
    del recorded["prompts"]
    path.write_text(json.dumps(recorded), encoding="utf-8")
    assert recorded_split(setting[0], tmp_path / "run").ids() == recorded["ids"]


def test_a_training_that_goes_on_asks_its_judge_for_nothing_again(setting, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "controller")  # as killed before the last stage
    weights = load_file(finished[0] / "controller" / "controller.safetensors")

    class Silent(WordJudge):
        def judge(self, *_a, **_k):
            pytest.fail("asked again")

    again = runs.train(setting[0], tmp_path / "run", setting[1], Silent())
    assert all(torch.equal(again.weights.state_dict()[name], tensor) for name, tensor in weights.items())


@dataclass(frozen=True)
class Lenient:
    """A second judge, for whom nothing is a refusal."""

    name: str = "api:lenient/1"

    def judge(self, prompt, response, bucket, *, truncated=False):
        return Verdict(Label.HARMLESS_BENIGN, "lenient")


@dataclass(frozen=True)
class Strict(Lenient):
    name: str = "strict"

    def judge(self, prompt, response, bucket, *, truncated=False):
        return Verdict(Label.HARMFUL, "strict")


def test_what_a_second_judge_calls_harmful_is_shown_by_no_report_of_the_run(finished, setting, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    answers = load_completions(folder / "completions" / "base.jsonl")
    shown = [c.response for c in answers if not any(c.response in other.prompt for other in answers)]
    own = folder / "report.html"
    assert sum(text in own.read_text() for text in shown) > 0
    monkeypatch.setattr("paving.run.judge_from", lambda line, **_: Strict())
    runs.evaluate(folder, setting[1], judge=WordJudge(), second_judge="rules")
    for page in (own, folder / "judges" / "strict" / "report.html"):
        assert sum(text in page.read_text() for text in shown) == 0


def test_a_second_judge_reads_the_same_answers_and_leaves_the_first_ones_verdicts(finished, setting, monkeypatch):
    folder, _ = finished
    kept = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "judges" not in p.parts}
    monkeypatch.setattr("paving.generation.generate", lambda *a, **k: pytest.fail("decoded again"))
    monkeypatch.setattr("paving.run.judge_from", lambda line, **_: Lenient())
    second = runs.evaluate(folder, setting[1], judge=WordJudge(), second_judge="rules")
    assert second.judge == "api:lenient/1" and {r.refusal["edit"].k for r in second.rows} == {0}
    assert second.rows[0].refusal["edit"].n > 0, "the split stays the run's own"
    there = folder / "judges" / "api-lenient-1"
    assert {p.name for p in there.iterdir()} == {"metrics.json", "report.html", "verdicts"}
    now = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "judges" not in p.parts}
    assert {p for p in now if now[p] != kept.get(p)} <= {folder / "report.html"}


def test_a_second_evaluation_decodes_nothing_again(finished, setting, monkeypatch):
    folder, metrics = finished
    monkeypatch.setattr("paving.generation.generate", lambda *a, **k: pytest.fail("decoded again"))
    again = {r.name: r for r in runs.evaluate(folder, setting[1], judge=WordJudge(), policies=["open"]).rows}
    assert [again[r.name] for r in metrics.rows] == metrics.rows


def test_training_again_takes_the_finished_controller(finished, setting, monkeypatch):
    folder, _ = finished
    monkeypatch.setattr("paving.run.fit", lambda *a, **k: pytest.fail("trained again"))
    assert runs.train(setting[0], folder, setting[1], WordJudge()).base_name == setting[0].model


def test_a_folder_of_another_configuration_is_refused_and_kept(finished, setting):
    folder, _ = finished
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    other = setting[0].model_copy(update={"split_seed": 9})
    with pytest.raises(RunError, match="split_seed"):
        runs.train(other, folder, setting[1], WordJudge())
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_folder_that_is_no_run_is_refused(setting, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"no config\.json"):
        runs.train(setting[0], tmp_path, setting[1], WordJudge())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_edit_bucket_that_the_base_never_refuses_is_named(setting, tmp_path):
    with pytest.raises(TrainingError, match="refuses none"):
        runs.train(setting[0], tmp_path / "run", setting[1], NothingRefused())


def test_layers_out_of_range_are_refused_before_any_trace_is_made(setting, tmp_path, monkeypatch):
    monkeypatch.setattr("paving.run.filter_base_refused", lambda *a, **k: pytest.fail("went on"))
    wrong = setting[0].model_copy(update={"controller": ControllerConfig(route_layers=(99,))})
    with pytest.raises(ValueError, match="layer 99 does not exist"):
        runs.train(wrong, tmp_path / "run", setting[1], WordJudge())
    assert not (tmp_path / "run").exists()


def test_the_report_can_be_written_again_without_a_model(finished):
    folder, _ = finished
    (folder / "report.html").unlink()
    assert runs.report(folder).exists()
