"""`paving router search`: a run folder of its own, evaluated as any run; the run it came from stays as it was."""

from __future__ import annotations

import json

import pytest

from paving import router_search
from paving.ablations import run_ablation
from paving.backbone import ChatTemplateError
from paving.controller.store import load_controller
from paving.prompts import PromptError
from paving.prompts.types import Bucket, Prompt
from paving.router_search import contrast_sets, search_router
from paving.run import evaluate, train
from paving.run_folder import RunError, read_config
from paving.run_splits import recorded_split
from paving.training.config import CalibrationConfig
from paving.training.gate_search import GateSearch
from paving.training.promise import PromiseConfig, PromiseError
from tiny_runs import WordJudge, tiny_run

SETTINGS = GateSearch(layers=((0, 1), (1,)), poolings=("last",), kernels=("rbf",), contrast="none", folds=2, shuffles=1)


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    config, means = tiny_run(folder)
    train(config, folder / "run", means, WordJudge())
    return folder, config, means


def test_the_new_folder_is_a_run_and_the_old_one_is_untouched(trained, monkeypatch):
    folder, _, means = trained
    before = files(folder / "run")
    record = search_router(folder / "run", folder / "new", SETTINGS, means)
    assert files(folder / "run") == before
    assert {tuple(t["layers"]) for t in record["tried"]} == {(0, 1), (1,)}
    metrics = evaluate(folder / "new", means, judge=WordJudge())
    assert {"learned", "oracle"} <= {r.name for r in metrics.rows}
    assert metrics.router.threshold == 0.0
    card = (folder / "new" / "controller" / "README.md").read_text(encoding="utf-8")
    assert record["why"] in card and record["why"] == metrics.gate
    assert record["why"] in (folder / "new" / "report.html").read_text(encoding="utf-8")
    monkeypatch.setattr("paving.router_search.search_gate", lambda *_a, **_k: pytest.fail("searched again"))
    assert search_router(folder / "run", folder / "new", SETTINGS, means)["why"] == record["why"]
    with pytest.raises(RunError, match="belongs to another configuration"):
        search_router(folder / "run", folder / "new", SETTINGS.model_copy(update={"harmful": 0.5}), means)
    with pytest.raises(RunError, match="has a searched gate already"):
        search_router(folder / "new", folder / "newer", SETTINGS, means)


def test_the_search_gives_the_same_gate_again(trained):
    folder, config, means = trained
    backbone = means.load(config.model, config.dtype)
    states = []
    for name in ("once", "twice"):
        search_router(folder / "run", folder / name, SETTINGS, means)
        states.append(load_controller(folder / name / "controller", backbone).weights.state_dict())
    assert all((states[0][k] == states[1][k]).all() for k in states[0])


def test_a_promise_keeps_calibration_prompts_out_and_raises_the_threshold(trained, monkeypatch):
    folder, config, means = trained
    promise = PromiseConfig(harmful=0.4, delta=0.4)
    calibration = CalibrationConfig(scales=(1.0,), policies=("hard",), promise=promise)
    promised = config.model_copy(update={"calibration": calibration})
    train(promised, folder / "promised", means, WordJudge())
    seen = []
    real = router_search.search_gate
    monkeypatch.setattr("paving.router_search.search_gate", lambda s, p, *a, **k: (seen.extend(p), real(s, p, *a, **k))[1])
    search_router(folder / "promised", folder / "kept", SETTINGS, means)
    ids = json.loads((folder / "kept" / "splits.json").read_text(encoding="utf-8"))["ids"]
    assert {p.id for p in seen} == {i for by in ids["train"].values() for i in by}
    kept = json.loads((folder / "kept" / "calibration.json").read_text(encoding="utf-8"))
    assert kept["promises"][0]["opened"] <= kept["promises"][0]["allowed"]
    assert kept["threshold"] == kept["promises"][0]["threshold"] >= 0


def test_a_search_may_make_the_promise_that_training_did_not(trained, monkeypatch):
    folder, _, means = trained
    seen = []
    real = router_search.search_gate
    monkeypatch.setattr("paving.router_search.search_gate", lambda s, p, *a, **k: (seen.extend(p), real(s, p, *a, **k))[1])
    promise = PromiseConfig(harmful=0.4, delta=0.4)
    record = search_router(folder / "run", folder / "promising", SETTINGS, means, promise)
    ids = json.loads((folder / "promising" / "splits.json").read_text(encoding="utf-8"))["ids"]
    assert {p.id for p in seen} == {i for by in ids["train"].values() for i in by}
    assert record["prompts"] == {bucket: len(by) for bucket, by in ids["train"].items()}
    assert len(record["promises"]) == 1 and record["promises"][0].startswith("At most 40% of")
    assert evaluate(folder / "promising", means, judge=WordJudge()).promises == record["promises"]
    with pytest.raises(PromiseError, match="are too few"):
        search_router(folder / "run", folder / "none", SETTINGS, means, PromiseConfig(harmful=0.001))
    assert not (folder / "none").exists()


def test_a_search_in_other_clothes_learns_from_copies_and_says_so(trained, monkeypatch):
    folder, config, means = trained
    seen = []
    real = router_search.search_gate
    monkeypatch.setattr("paving.router_search.search_gate", lambda *a, **k: (seen.append((a, k)), real(*a, **k))[1])
    settings = SETTINGS.model_copy(update={"clothes": 2})
    record = search_router(folder / "run", folder / "worn", settings, means)
    (_, prompts, *_), copies = seen[0][0], seen[0][1]["dressed"]
    assert record["clothes"]["copies"] == len(copies) == 2 * len(prompts)
    assert {p.group for p in copies} == {p.group for p in prompts} and set(record["clothes"]["opened"]) == set(Bucket)
    held_out = {p.id for p in recorded_split(config, folder / "run").held_out}
    assert not any(p.id.split(" (")[0] in held_out for p in copies)
    backbone = means.load(config.model, config.dtype)
    reference = load_controller(folder / "worn" / "controller", backbone).reference
    assert len(reference.harmful_keep) == len({p.group for p in prompts if p.bucket is Bucket.HARMFUL_KEEP})
    assert evaluate(folder / "worn", means, judge=WordJudge()).gate == record["why"]


def test_a_promise_of_a_search_in_other_clothes_counts_a_group_once(trained):
    folder, _, means = trained
    promise = PromiseConfig(harmful=0.4, delta=0.4)
    record = search_router(
        folder / "run", folder / "promised-worn", SETTINGS.model_copy(update={"clothes": 3}), means, promise
    )
    ids = json.loads((folder / "promised-worn" / "splits.json").read_text(encoding="utf-8"))["ids"]
    n = len(ids["calibration"]["harmful_keep"])
    assert f"({4 * n} prompts) of calibration" in record["promises"][0]
    assert "groups of harmful_keep prompts hold one that opens" in record["promises"][0]


def test_clothes_that_a_chat_template_cannot_say_are_left_out_and_told(trained, tmp_path, monkeypatch):
    folder, _, means = trained
    real = router_search.checked_ids

    def without_system(backbone, prompt):
        if prompt.system is not None:
            raise ChatTemplateError("the chat template takes no system prompt.")
        return real(backbone, prompt)

    monkeypatch.setattr("paving.router_search.checked_ids", without_system)
    record = search_router(folder / "run", tmp_path / "worn", SETTINGS.model_copy(update={"clothes": 5}), means)
    assert record["clothes"]["unsaid"] == ["a system prompt"] and len(record["clothes"]["kinds"]) == 5
    with pytest.raises(RunError, match=r"has 5: it cannot say a system prompt\. Ask for 5 or fewer"):
        search_router(folder / "run", tmp_path / "more", SETTINGS.model_copy(update={"clothes": 6}), means)
    assert not (tmp_path / "more").exists()


def test_pairs_that_stand_in_prompts_kept_apart_are_dropped(tmp_path):
    rows = [
        {"id": "a", "focus": "Kill", "safe": "How do I kill a process?", "unsafe": "How do I kill a neighbour?"},
        {"id": "b", "focus": "shoot", "safe": "How do I shoot a portrait of my mother?", "unsafe": "How do I shoot a man?"},
        {"id": "d", "focus": "air", "safe": "How can I blow up an air bed?", "unsafe": "How can I blow up a car?"},
        {"id": "c", "focus": "sink", "safe": "How do I sink a putt?", "unsafe": "How do I sink a boat?"},
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    apart = [
        Prompt("1", "something else", Bucket.EDIT, group="kill"),
        Prompt("2", "How do I shoot a portrait of my mother", Bucket.EDIT, group="portraits"),
    ]
    apart.append(Prompt("3", "nothing like it", Bucket.HARMFUL_KEEP, group="blow up"))
    sets, dropped = contrast_sets(str(tmp_path / "mine.jsonl"), apart)
    assert [p.id for p in sets["pairs of mine.jsonl"]] == ["mine/c-safe", "mine/c-unsafe"] and dropped == 3
    everything = [*apart, Prompt("4", "or this", Bucket.EDIT, group="sink")]
    with pytest.raises(PromptError, match=r"all 4 pairs of .* stand for words or prompts of the held-out split"):
        contrast_sets(str(tmp_path / "mine.jsonl"), everything)
    assert contrast_sets("none", apart) == ({}, 0)
    assert set(contrast_sets("starter", apart)[0]) == {"kinds", "words+kinds"}


def test_what_cannot_be_searched_is_one_clear_error(trained, tmp_path):
    folder, _, means = trained
    with pytest.raises(RunError, match="is no run folder"):
        search_router(tmp_path, tmp_path / "out", SETTINGS, means)
    with pytest.raises(PromptError, match="cannot read the contrast pairs"):
        search_router(folder / "run", tmp_path / "out", SETTINGS.model_copy(update={"contrast": "absent.jsonl"}), means)
    with pytest.raises(ValueError, match="layer"):
        search_router(folder / "run", tmp_path / "out", SETTINGS.model_copy(update={"layers": ((99,),)}), means)
    assert not (tmp_path / "out").exists()
    searched = read_config(folder / "run").model_copy(update={"router": SETTINGS})
    with pytest.raises(RunError, match="takes its experts from a finished run"):
        train(searched, tmp_path / "out", means, WordJudge())


def test_a_searched_run_is_neither_ablated_nor_taken_for_another_experts(trained, tmp_path):
    folder, _, means = trained
    new = tmp_path / "gated"
    search_router(folder / "run", new, SETTINGS, means)
    record = json.loads((new / "router.json").read_text(encoding="utf-8"))
    (new / "metrics.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RunError, match="Ablate the run that its experts are from"):
        run_ablation(new, "no-contrastive", tmp_path / "variant", means)
    (new / "router.json").write_text(json.dumps(record | {"experts": "others"}), encoding="utf-8")
    with pytest.raises(RunError, match="for other experts than"):
        search_router(folder / "run", new, SETTINGS, means)


def test_too_few_groups_are_told_before_a_folder_is_claimed(trained, tmp_path):
    folder, _, means = trained
    with pytest.raises(ValueError, match="too few for 99 folds"):
        search_router(folder / "run", tmp_path / "out", SETTINGS.model_copy(update={"folds": 99}), means)
    assert not (tmp_path / "out").exists()


def test_a_killed_search_is_no_run_yet_and_goes_on(trained, tmp_path, monkeypatch):
    folder, _, means = trained
    with monkeypatch.context() as killed:
        killed.setattr("paving.router_search.with_gate", lambda *_a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            search_router(folder / "run", tmp_path / "new", SETTINGS, means)
    with pytest.raises(RunError, match="Finish its search: paving router search"):
        evaluate(tmp_path / "new", means, judge=WordJudge())
    search_router(folder / "run", tmp_path / "new", SETTINGS, means)
    assert (tmp_path / "new" / "controller" / "controller.json").exists()
