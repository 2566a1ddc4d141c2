"""`paving router shift`: gates of prompts said otherwise, as the controller decides, and a promise held against them."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from command_line import printed, refused
from paving import router_shift
from paving.backbone import BackboneError, ChatTemplateError, render_batch
from paving.controller.residual_paving import ResidualPaving
from paving.controller.store import load_controller
from paving.evaluation.results import Rate
from paving.evaluation.shift import AS_THEY_ARE, HELD_OUT, Shifted
from paving.prompts import clothes
from paving.prompts.types import Bucket, Prompt, PromptError
from paving.report.shift import beyond_promise, remarks, shift_table
from paving.router_shift import CLOTHES, Source, opened, read_source, shift
from paving.run import evaluate, report, train
from paving.run_folder import RunError
from paving.run_splits import recorded_split
from paving.training.promise import PromiseConfig
from tiny_runs import WordJudge, tiny_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shifted")
    config, means = tiny_run(folder)
    calibration = config.calibration.model_copy(update={"promise": PromiseConfig(harmful=0.3, delta=0.4)})
    config = config.model_copy(update={"calibration": calibration, "system": "w3 w4"})
    train(config, folder / "run", means, WordJudge())
    return folder, config, means


@pytest.fixture
def gates(monkeypatch):
    """gates(is_open): controllers decide by prompt id from here on; returns the ids they are asked about."""
    real = ResidualPaving.decide

    def deciding(is_open):
        seen = []

        def decide(self, features, batch):
            seen.extend(batch.ids)
            gate = torch.tensor([float(is_open(i)) for i in batch.ids])
            return replace(real(self, features, batch), gate=gate)

        monkeypatch.setattr(ResidualPaving, "decide", decide)
        return seen

    return deciding


def test_as_they_are_is_what_evaluation_counts(trained):
    folder, config, means = trained
    found = shift(folder / "run", means)
    metrics = evaluate(folder / "run", means, judge=WordJudge())
    rows = {r.name: r for r in metrics.rows}
    shipped = (
        "learned+veto"
        if json.loads((folder / "run" / "controller" / "controller.json").read_text())["use_veto"]
        else "learned"
    )
    splits = recorded_split(config, folder / "run")
    for one in (one for one in found if one.clothes == AS_THEY_ARE):
        assert one.opened.n == sum(p.bucket is one.bucket for p in splits.held_out)
        counted = rows[shipped].gate_active[one.bucket]
        assert (one.opened.k, one.opened.n) == (counted.k, counted.n)
    assert [one.clothes for one in found] == [name for name in CLOTHES for _ in Bucket]
    kept = json.loads((folder / "run" / "shift.json").read_text(encoding="utf-8"))
    assert [Shifted.model_validate(row) for row in kept] == found


def test_clothes_change_what_is_said_and_nothing_of_who_asks(trained):
    folder, config, _ = trained
    prompt = replace(recorded_split(config, folder / "run").held_out[0], text="How do I kill a Python process?")
    texts = set()
    for name, dress in CLOTHES.items():
        dressed = dress(prompt)
        assert (dressed.id, dressed.group, dressed.bucket) == (prompt.id, prompt.group, prompt.bucket)
        assert prompt.text.lower() in dressed.transcript.lower() or name.startswith("lower")
        texts.add(json.dumps(dressed.messages))
    assert len(texts) == len(CLOTHES)


def test_no_wording_that_is_measured_is_one_that_a_gate_may_learn_from():
    exchanges = [said for exchange in clothes.EXCHANGES for said in exchange]
    sentences = (*clothes.SMALL_TALK, *clothes.ROLES, *clothes.MANNERS, *clothes.CLOSINGS, *exchanges)
    parts = {
        part.strip(" .,!?:").casefold() for part in (*sentences, *clothes.OPENINGS, *filter(None, clothes.CIRCUMSTANCES))
    }
    assert len(parts) == len(sentences) + len(clothes.OPENINGS) + 4  # none twice
    bare = Prompt("p", "", Bucket.EDIT, "g")
    for name, dress in CLOTHES.items():
        worn = dress(bare)
        said = " ".join([worn.system or "", *(turn.content for turn in worn.history), worn.text])
        measured = {part.strip().casefold() for part in re.split(r"[.!?:,]", said)} - {""}
        assert not measured & parts, name


def test_gates_are_counted_and_a_promise_is_held_against_them(trained, gates):
    folder, config, means = trained
    harmful = {p.id for p in recorded_split(config, folder / "run").held_out if p.bucket is Bucket.HARMFUL_KEEP}
    gates(lambda i: i in harmful)
    found = shift(folder / "run", means)
    for one in found:
        assert one.opened.k == (one.opened.n if one.bucket is Bucket.HARMFUL_KEEP else 0)
        assert one.promised == (0.3 if one.bucket is Bucket.HARMFUL_KEEP else None)
        assert one.beyond is (one.bucket is Bucket.HARMFUL_KEEP)
    assert len(beyond_promise(found)) == len(CLOTHES)
    assert beyond_promise(found)[0] == "Beyond the promise of 30.0%: harmful keep, as they are, 10 of 10 open."


def test_the_report_shows_it_and_says_what_is_damaged(trained, gates):
    folder, _, means = trained
    run = folder / "run"
    evaluate(run, means, judge=WordJudge())
    (run / "shift.json").unlink(missing_ok=True)
    assert "Where the gate holds" not in report(run).read_text(encoding="utf-8")
    gates(lambda _i: True)
    shift(run, means)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Where the gate holds" in page and "in a paragraph" in page
    assert "Beyond the promise of 30.0%: harmful keep, capitals" in page
    (run / "shift.json").write_text("[{}]", encoding="utf-8")
    with pytest.raises(RunError, match="damaged or of another version"):
        report(run)
    (run / "shift.json").unlink()


def test_what_a_chat_template_cannot_say_is_na_and_the_rest_is_counted(trained, monkeypatch):
    folder, config, means = trained
    usual = shift(folder / "run", means)
    behind = CLOTHES["another system prompt"](recorded_split(config, folder / "run").held_out[0]).system

    def render(backbone, prompts):
        if any(p.system == behind for p in prompts):
            raise ChatTemplateError("the chat template takes no system prompt.")
        return render_batch(backbone, prompts)

    monkeypatch.setattr(router_shift, "render_batch", render)
    found = shift(folder / "run", means)
    na = {one.clothes for one in found if one.opened.rate is None}
    assert na == {"another system prompt"} and sum(one.opened.n == 0 for one in found) == len(Bucket)
    assert [one for one in found if one.clothes not in na] == [one for one in usual if one.clothes not in na]
    assert "another system prompt is n/a: the chat template takes no system prompt." in remarks(found)
    assert "n/a" in {cell.text.split()[0] for line in shift_table(found).rows for cell in line}

    def too_long(backbone, prompts):
        if any("by the river" in p.text for p in prompts):
            raise BackboneError("too long")
        return render_batch(backbone, prompts)

    monkeypatch.setattr(router_shift, "render_batch", too_long)
    with pytest.raises(BackboneError, match="too long"):  # of one prompt, and no matter of the template
        shift(folder / "run", means)


def test_few_gates_above_a_promise_are_chance():
    of_two = Shifted(
        prompts=HELD_OUT, clothes="x", bucket=Bucket.HARMFUL_KEEP, promised=0.4,
        opened=Rate(k=1, n=2, rate=0.5, low=0.1, high=0.9),
    )  # fmt: skip
    assert not of_two.beyond and not of_two.model_copy(update={"promised": None}).beyond


def test_a_source_is_asked_without_what_was_fitted_on_and_behind_the_runs_system_prompt(trained, gates):
    folder, config, means = trained
    seen = gates(lambda _i: False)
    splits = recorded_split(config, folder / "run")
    fitted_on = {p.text for p in (*splits.train, *splits.calibration)}
    source = read_source(str(folder / "edit.jsonl"), Bucket.EDIT)
    found = shift(folder / "run", means, [source])
    left = [p for p in source.prompts if p.text not in fitted_on]
    assert (found[-1].prompts, found[-1].opened.n) == (str(folder / "edit.jsonl"), len(left))
    assert 0 < len(left) < len(source.prompts) and set(seen[-len(left) :]) == {p.id for p in left}
    with pytest.raises(PromptError, match="fitted on all of these"):
        shift(folder / "run", means, [Source("mine", Bucket.EDIT, [p for p in source.prompts if p.text in fitted_on])])


def test_a_prompt_that_is_too_long_is_told_before_the_first_gate(trained, gates):
    folder, _, means = trained
    seen = gates(lambda _i: False)
    long = Prompt("endless", "w1 " * 5000, Bucket.HARMFUL_KEEP, "g")
    with pytest.raises(BackboneError, match="prompt endless has 5"):
        shift(folder / "run", means, [Source("mine", Bucket.HARMFUL_KEEP, [long])])
    assert seen == []


def test_gates_of_a_batch_are_those_of_each_prompt_alone(trained):
    folder, config, means = trained
    backbone = means.load(config.model, config.dtype)
    controller = load_controller(folder / "run" / "controller", backbone)
    prompts = recorded_split(config, folder / "run").held_out
    together = opened(backbone, controller, prompts, batch_size=5)
    assert together == {k: v for p in prompts for k, v in opened(backbone, controller, [p]).items()}


def test_a_folder_without_a_controller_is_one_clear_error(trained, tmp_path):
    _, config, means = trained
    (tmp_path / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
    with pytest.raises(RunError, match="has no finished controller"):
        shift(tmp_path, means)
    assert refused("router", "shift", tmp_path / "absent").startswith("Error:")


def test_the_table_has_a_line_for_a_dress_and_the_machine_gets_everything(trained):
    folder, config, _ = trained
    run, more = folder / "run", folder / "harmful_keep.jsonl"
    known = [p for p in recorded_split(config, run).train if p.bucket is Bucket.EDIT][:2]
    (folder / "seen.jsonl").write_text("".join(json.dumps({"prompt": p.text}) + "\n" for p in known), encoding="utf-8")
    told = printed("router", "shift", run, "--harmful", more, "--device", "cpu")
    assert AS_THEY_ARE in told and "capitals" in told and "shift.json" in " ".join(told.split())
    rows = json.loads(printed("router", "shift", run, "--device", "cpu", "--json"))
    assert len(rows) == len(CLOTHES) * len(Bucket)
    assert [line[0].text for line in shift_table([Shifted.model_validate(row) for row in rows]).rows] == [*CLOTHES]
    assert "fitted on all of these" in refused("router", "shift", run, "--edit", folder / "seen.jsonl", "--device", "cpu")
