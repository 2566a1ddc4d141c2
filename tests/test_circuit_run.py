"""A circuit run from files to files, on a tiny model: what each stage leaves behind, what a second call takes from there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from paving.circuit import edges
from paving.circuit.mask import CircuitError
from paving.circuit_run import CircuitConfig, StrengthConfig, edit, evaluate, find, stages, trained
from paving.circuit_run.inputs import held_out_sets
from paving.cli_circuit import circuit_config
from paving.evaluation.judges import Label, Verdict
from paving.generation import Decoding
from paving.report.examples import REDACTED
from paving.run import Means
from paving.run_folder import RunError
from tiny_circuit_runs import WordJudge, run_whole, tiny_circuit, write_circuit_files
from tiny_models import tiny_backbone


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_circuit_files(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def means(tmp_path):
    return Means.default(cache=tmp_path / "cache")


def test_a_run_leaves_circuit_delta_curve_metrics_and_report(files, tmp_path, means):
    folder = tmp_path / "run"
    delta = run_whole(files, folder, means)
    assert delta.alpha in (0.5, 1.0) and delta.mask.size == 5 * round(0.15 * 48)
    metrics = evaluate(folder, means, against=["inverse", "as"], judge=WordJudge())
    assert [r.name for r in metrics.rows][:2] == ["base", "c-delta-theta"]
    assert {name: s.side for name, s in metrics.rows[0].sets.items()} == {
        "harm": "category", "benign": "benign", "other": "other",
    }  # fmt: skip
    assert all(s.refused.n == 4 for s in metrics.rows[1].sets.values())
    assert metrics.rows[0].sets["harm"].against_base is None
    assert metrics.rows[1].sets["harm"].against_base.n == 4
    assert set(metrics.frontier) == {"c-delta-theta", "inverse", "as"}
    assert [p.strength for p in metrics.frontier["c-delta-theta"]] == [0.0, 0.5, 1.0]
    assert 0 < metrics.touched < 0.2
    assert "c-delta-theta" in (folder / "report.html").read_text(encoding="utf-8")
    card = json.loads((folder / "delta" / "delta.json").read_text(encoding="utf-8"))
    assert card["components"][0]["metrics"]["benign_over_refusal"]["n"] == 4
    recipe = card["components"][0]["recipe"]
    assert (recipe["pairs"], recipe["judge"], recipe["fraction"]) == ("train.jsonl", "words-1", 0.15)
    assert recipe.keys() >= {"pairs_sha256", "openings_sha256", "own_tokens", "decoding", "calibration_pairs"}
    assert recipe["calibration"]["n_benign"] == recipe["calibration_pairs"]
    assert str(tmp_path) not in json.dumps(card) and str(files) not in json.dumps(card)  # it is shared


def test_what_is_finished_is_not_done_again(files, tmp_path, means, monkeypatch):
    folder = tmp_path / "run"
    delta = run_whole(files, folder, means)
    first = evaluate(folder, means, against=["random"], judge=WordJudge())

    def forbidden(*_args, **_kwargs):
        raise AssertionError("done again")

    for where in ("stages.attribute", "trained.weight_delta", "stages.sweep"):
        monkeypatch.setattr(f"paving.circuit_run.{where}", forbidden)
    monkeypatch.setattr("paving.generation.generate", forbidden)
    assert find(tiny_circuit(files), folder, means) == delta.mask
    assert edit(folder, means, judge=WordJudge()).edited().keys() == delta.edited().keys()
    assert evaluate(folder, means, against=["random"], judge=WordJudge()) == first


@pytest.mark.parametrize("killed_in", ["stages.attribute", "stages.calibrated", "stages.make_delta"])
def test_a_killed_run_goes_on_to_the_same_delta(files, tmp_path, means, monkeypatch, killed_in):
    whole = run_whole(files, tmp_path / "whole", means)
    folder = tmp_path / "killed"

    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"paving.circuit_run.{killed_in}", killed)
        run_whole(files, folder, means)
    again = run_whole(files, folder, means)
    assert (folder / "delta" / "delta.safetensors").read_bytes() == (tmp_path / "whole/delta/delta.safetensors").read_bytes()
    assert again.description == whole.description


def test_pairs_that_change_under_a_run_are_refused_for_what_was_trained_on_would_choose_alpha(files, tmp_path, means):
    (tmp_path / "files").mkdir()
    own = write_circuit_files(tmp_path / "files")
    folder = tmp_path / "run"
    find(tiny_circuit(own), folder, means)
    before = (own / "train.jsonl").read_text(encoding="utf-8")
    (own / "train.jsonl").write_text(before + '{"id": "new", "base": "w7 w8", "harm": "w111 w112"}\n', encoding="utf-8")
    kept = {p: p.read_bytes() for p in folder.iterdir()}
    for stage in (
        lambda: find(tiny_circuit(own), folder, means),
        lambda: edit(folder, means),
        lambda: evaluate(folder, means),
    ):
        with pytest.raises(RunError, match=r"train\.jsonl has changed since the circuit in .* was found"):
            stage()
    assert {p: p.read_bytes() for p in folder.iterdir()} == kept
    (own / "train.jsonl").write_text(before, encoding="utf-8")
    edit(folder, means, judge=WordJudge())


def test_nothing_of_the_compliance_fine_tune_is_written(files, tmp_path, means, monkeypatch):
    """θ− lives in memory only: no file of the run holds its values."""
    from safetensors.torch import load_file

    from paving.circuit import arithmetic

    seen = {}
    original = arithmetic.fine_tuned

    def remembered(backbone, texts, mask, side, *rest):
        seen[side] = original(backbone, texts, mask, side, *rest)
        return seen[side]

    monkeypatch.setattr(arithmetic, "fine_tuned", remembered)
    run_whole(files, tmp_path / "run", means)
    stored = [t for path in (tmp_path / "run").rglob("*.safetensors") for t in load_file(path).values()]
    assert stored and set(seen) == {"refusal", "compliance"}
    for values in seen["compliance"].values():
        assert not any(t.shape == values.shape and (t.float() - values).abs().max() < 1e-6 for t in stored)


def test_no_alpha_within_the_limit_is_an_error_that_keeps_the_work(files, tmp_path, means):
    class AlwaysRefused(WordJudge):
        def judge(self, *_args, **_kwargs):
            return Verdict(Label.HARMLESS_REFUSAL, "")

    folder = tmp_path / "run"
    find(tiny_circuit(files, strength=StrengthConfig(alphas=(0.5,), limit=0.5, max_new_tokens=2)), folder, means)
    with pytest.raises(RunError, match=r"no α of 0.5 keeps benign over-refusal within 50.0%.*--alpha"):
        edit(folder, means, judge=AlwaysRefused())
    assert not (folder / "delta").exists() and (folder / "slices.safetensors").exists()
    assert edit(folder, means, alpha=0.5, judge=AlwaysRefused()).alpha == 0.5
    with pytest.raises(RunError, match=r"has α 0\.5 already"):
        edit(folder, means, alpha=0.7, judge=AlwaysRefused())


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_alpha_that_is_none_is_refused_before_anything_is_trained(files, tmp_path, means, alpha):
    find(tiny_circuit(files), tmp_path / "run", means)
    with pytest.raises(CircuitError, match="give a positive number"):
        edit(tmp_path / "run", means, alpha=alpha, judge=WordJudge())
    assert not (tmp_path / "run" / "slices.safetensors").exists()
    with pytest.raises(ValueError, match="alphas must be positive"):
        StrengthConfig(alphas=(1.0, alpha))


def test_a_second_evaluation_keeps_the_rows_and_sources_of_the_first(files, tmp_path, means):
    folder, ood = tmp_path / "run", tmp_path / "elsewhere.jsonl"
    ood.write_text("".join(json.dumps({"prompt": f"w{i} w3"}) + "\n" for i in range(3)), encoding="utf-8")
    run_whole(files, folder, means)
    asked = {"ood": [str(ood)], "ood_benign": [f"{ood}?prompt=w1*"]}  # one file may hold both kinds
    first = evaluate(folder, means, against=["random"], **asked, judge=WordJudge())
    second = evaluate(folder, means, against=["as"], judge=WordJudge())
    assert [*second.frontier] == ["c-delta-theta", "random", "as"]
    assert second.rows[: len(first.rows)] == first.rows and second.rows[1].sets["elsewhere"].refused.n == 3
    assert second.rows[-1].name == "as" and "elsewhere" in second.rows[-1].sets
    benign = second.rows[-1].sets["elsewhere-benign"]
    assert (benign.side, benign.refused.n) == ("ood-benign", 1)
    assert "elsewhere-benign (ood-benign) ↓" in (folder / "report.html").read_text(encoding="utf-8")


def test_prompts_that_the_run_has_seen_are_not_held_out(files, tmp_path, means):
    """On either side, in either split; public sets repeat themselves, up to case and punctuation."""
    train = [json.loads(line) for line in (files / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    test = [json.loads(line) for line in (files / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    test[0]["harm"] = train[3]["harm"].upper() + "!"
    test[1]["base"] = train[5]["base"]
    test[2]["other"] = train[7]["harm"]
    held_out = tmp_path / "test.jsonl"
    held_out.write_text("".join(json.dumps(r) + "\n" for r in test), encoding="utf-8")
    run_whole(files, tmp_path / "run", means, held_out=str(held_out))
    metrics = evaluate(tmp_path / "run", means, judge=WordJudge())
    assert {name: s.refused.n for name, s in metrics.rows[1].sets.items()} == {"harm": 3, "benign": 3, "other": 3}
    assert metrics.left_out == 3 and metrics.pairs["held_out"] == 3
    assert "3 held-out prompts stand among the run&#39;s own pairs" in (tmp_path / "run/report.html").read_text("utf-8")
    with pytest.raises(RunError, match="nothing of it is held out"):
        find(tiny_circuit(files, held_out=str(files / "train.jsonl")), tmp_path / "other", means)
    assert not (tmp_path / "other").exists()


def test_nearly_the_same_wording_is_not_held_out_but_a_contrast_is(files, tmp_path, means):
    train = [json.loads(line) for line in (files / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    test = [json.loads(line) for line in (files / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    train[0] |= {"harm": "tell me how a very long sentence about w3 would go on", "base": "a long benign line on w9 and w8"}
    test[0]["harm"] = "tell me how a very long sentence about w4 would go on"
    test[1]["base"] = "tell me how a very long sentence about w5 would go on"  # worded as the harmful one: a contrast
    for name, rows in (("train", train), ("test", test)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    sets, left_out = held_out_sets(tiny_circuit(tmp_path, **without_paths(files), held_out=str(tmp_path / "test.jsonl")), {})
    assert {s.name: len(s.prompts) for s in sets} == {"harm": 3, "benign": 4, "other": 4} and left_out == 1


def test_other_categories_and_sources_have_a_limit_of_their_own(files, tmp_path):
    source = tmp_path / "elsewhere.jsonl"
    source.write_text("".join(json.dumps({"id": f"s{i}", "text": f"w{i} w9 w{i + 3}"}) + "\n" for i in range(6)))
    sizes = {}
    for others in (None, 2):
        sets, _ = held_out_sets(tiny_circuit(files, held_out_limit=3, others_limit=others), {"elsewhere": str(source)})
        sizes[others] = [len(s.prompts) for s in sets]
    assert sizes == {None: [3, 3, 3, 3], 2: [3, 3, 2, 2]}


def test_no_strength_is_tried_beyond_enough(files, tmp_path, means):
    strength = StrengthConfig(alphas=(0.5, 1.0, 50.0, 100.0), limit=1.0, max_new_tokens=3, enough=0.0)
    find(tiny_circuit(files, strength=strength), tmp_path / "run", means)
    edit(tmp_path / "run", means, alpha=0.5, judge=WordJudge())
    points = json.loads((tmp_path / "run" / "strengths.json").read_text())["points"]
    assert [p["benign_refused"] for p in points[:-1]] == [0] * (len(points) - 1)
    assert points[-1]["benign_refused"] > 0 and len(points) < 5  # a huge Δθ breaks the tiny model into refusing


def without_paths(files) -> dict:
    return {"model": str(files / "base"), "openings": str(files / "openings.json")}


def test_an_edit_that_reached_a_weight_off_the_circuit_makes_no_delta(files, tmp_path, means, monkeypatch):
    folder = tmp_path / "run"
    find(tiny_circuit(files), folder, means)
    whole = trained.weight_delta

    def astray(backbone, *args, **kwargs):
        backbone.model.get_input_embeddings().weight.data[3, 3] += 1
        return whole(backbone, *args, **kwargs)

    monkeypatch.setattr(trained, "weight_delta", astray)
    with pytest.raises(CircuitError, match=r"outside the circuit have changed: .*embed_tokens"):
        edit(folder, means, judge=WordJudge())
    assert not (folder / "delta").exists()


def test_a_fraction_that_chooses_nothing_is_refused_before_attribution(files, tmp_path, means, monkeypatch):
    monkeypatch.setattr(stages, "attribute", lambda *_a, **_k: pytest.fail("attributed"))
    with pytest.raises(CircuitError, match=r"a fraction of 0\.001 of 48 channels is 0"):
        find(tiny_circuit(files, fraction=0.001), tmp_path / "run", means)
    monkeypatch.undo()
    find(tiny_circuit(files), tmp_path / "run", means)  # the folder does not belong to what was refused


def test_a_base_whose_edit_cannot_be_exported_is_said_before_anything_is_found(files, tmp_path, means):
    told = []
    asked = replace(means, say=told.append)
    find(tiny_circuit(files), tmp_path / "as stored", asked)
    assert not any("cannot be written into a checkpoint" in line for line in told)
    find(tiny_circuit(files, dtype="bfloat16"), tmp_path / "another", asked)
    (line,) = [line for line in told if "cannot be written into a checkpoint" in line]
    assert "is bfloat16 here, and F32 in" in line


def test_a_judge_is_named_without_folders_and_addresses(tmp_path):
    assert stages.public_judge(f"hf:rubric={tmp_path}/model") == "rubric=model"
    assert stages.public_judge("api:openai/gpt-4o-mini,base_url=http://10.0.0.1:8000") == "api=openai/gpt-4o-mini"
    assert [stages.public_judge(judge) for judge in ("rules", "words-1")] == ["rules", "words-1"]


def test_a_recipe_by_name_is_that_of_the_command():
    given = {"pairs": "p.jsonl", "category": "harm"}
    config = CircuitConfig.of_recipe("selective", **given)
    assert config == circuit_config(None, "selective", reading=None, seed=None, **given)
    assert (config.fraction, config.arithmetic.retain, config.arithmetic.minus) == (0.06, "kl", False)
    smaller = CircuitConfig.of_recipe("selective", **given, arithmetic={"batch_size": 4}).arithmetic
    assert smaller == config.arithmetic.model_copy(update={"batch_size": 4})  # the recipe goes over it setting by setting
    with pytest.raises(ValueError, match="allowed: published, selective"):
        CircuitConfig.of_recipe("other", **given)


@pytest.mark.parametrize("column", ["benign", "Harm", "../harm", "a/b"])
def test_two_sets_never_share_a_name_or_leave_the_folder(files, tmp_path, means, column):
    rows = [json.loads(line) for line in (files / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    named = tmp_path / "named.jsonl"
    named.write_text("".join(json.dumps({**r, column: r["other"]}) + "\n" for r in rows), encoding="utf-8")
    with pytest.raises(RunError, match=r"sets? of prompts (are|is) called"):
        find(tiny_circuit(files, held_out=str(named)), tmp_path / "run", means)


def test_an_evaluation_of_a_base_that_has_changed_is_refused(files, tmp_path, means):
    folder, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(files / "base", base)
    run_whole(files, folder, means, model=str(base))
    tiny_backbone(seed=1).model.save_pretrained(base)
    with pytest.raises(CircuitError, match="found on a base with fingerprint"):
        evaluate(folder, means, judge=WordJudge())


def test_an_answer_judged_harmful_is_on_no_page(files, tmp_path, means):
    class Alarmed(WordJudge):
        def judge(self, prompt, response, bucket=None, *, truncated=False):
            return Verdict(Label.HARMFUL, "")

    folder = tmp_path / "run"
    find(tiny_circuit(files, decoding=Decoding(max_new_tokens=9)), folder, means)
    edit(folder, means, judge=Alarmed())
    evaluate(folder, means, judge=Alarmed())
    page = (folder / "report.html").read_text(encoding="utf-8")
    answers = [line for path in folder.rglob("completions/*.jsonl") for line in path.read_text("utf-8").splitlines()]
    responses = [json.loads(line)["response"] for line in answers]
    assert REDACTED in page and any(responses) and not any(r in page for r in responses if r)


@pytest.mark.parametrize(("asked", "tokens"), [(None, 4), (2, 2)])
def test_strengths_are_chosen_on_answers_as_long_as_the_runs(files, tmp_path, means, monkeypatch, asked, tokens):
    seen = []
    original = stages.sweep

    def remembered(*args, **kwargs):
        seen.append(args[6])
        return original(*args, **kwargs)

    monkeypatch.setattr(stages, "sweep", remembered)
    run_whole(files, tmp_path / "run", means, strength=StrengthConfig(alphas=(0.5,), limit=1.0, max_new_tokens=asked))
    assert seen == [Decoding(max_new_tokens=tokens)]


def test_a_circuit_found_anew_does_not_take_over_what_was_made_of_the_old_one(files, tmp_path, means):
    """Its channels may be others: the base may have changed since, or rounding on another machine."""
    run_whole(files, tmp_path / "run", means)
    (tmp_path / "run" / "circuit.json").unlink()
    with pytest.raises(RunError, match=r"slices\.safetensors, strengths\.json, delta, made of a circuit that is gone"):
        find(tiny_circuit(files), tmp_path / "run", means)
    assert not (tmp_path / "run" / "circuit.json").exists()


def test_strengths_that_another_judge_counted_are_not_taken_over(files, tmp_path, means):
    class OtherJudge(WordJudge):
        name = "words-2"

    folder, all_of_them = tmp_path / "run", StrengthConfig(alphas=(0.5,), limit=1.0, max_new_tokens=2)
    run_whole(files, folder, means, strength=all_of_them)
    with pytest.raises(RunError, match="chosen by the judge words-1; by words-2"):
        evaluate(folder, means, judge=OtherJudge())
    shutil.rmtree(folder / "delta")
    edit(folder, means, judge=OtherJudge())
    assert json.loads((folder / "strengths.json").read_text(encoding="utf-8"))["judge"] == "words-2"


@pytest.mark.parametrize("name", ["circuit.json", "slices.safetensors", "strengths.json"])
def test_a_damaged_file_is_named(files, tmp_path, means, name):
    folder = tmp_path / "run"
    run_whole(files, folder, means)
    shutil.rmtree(folder / "delta")
    (folder / name).write_text("{}[", encoding="utf-8")
    with pytest.raises(RunError, match=f"{name} is (missing or )?damaged"):
        edit(folder, means, judge=WordJudge())


def test_bad_input_is_one_clear_error_and_makes_no_folder(files, tmp_path, means):
    folder = tmp_path / "run"
    with pytest.raises(CircuitError, match="no pairs for the category 'crime'"):
        find(tiny_circuit(files, category="crime"), folder, means)
    with pytest.raises(CircuitError, match="leave none to train on"):
        find(tiny_circuit(files, calibration=14), folder, means)
    assert not folder.exists()
    with pytest.raises(RunError, match=r"holds no config\.json"):
        edit(folder, means)
    find(tiny_circuit(files, held_out=None), folder, means)
    with pytest.raises(RunError, match="belongs to another configuration"):
        find(tiny_circuit(files, fraction=0.2), folder, means)
    with pytest.raises(RunError, match="no held-out pairs"):
        evaluate(folder, means)
    with pytest.raises(ValueError, match="'caa' is not known; allowed: as, cast, ws, inverse, random"):
        evaluate(folder, means, against=["caa"])


def test_an_edge_level_circuit_says_which_layers_channels_are_taken_from(files, tmp_path, means):
    everything = find(tiny_circuit(files), tmp_path / "all", means)
    some = find(tiny_circuit(files, edges=12, edge_pairs=2), tmp_path / "edges", means)
    held = edges.ffn_layers(edges.load_circuit(tmp_path / "edges" / "edges.json"))
    assert set(some.channels) == set(held) & set(everything.channels) and set(some.channels) < set(everything.channels)
    assert all(some.channels[layer] == everything.channels[layer] for layer in some.channels)


def test_a_circuit_of_another_base_is_refused(files, tmp_path, means):
    folder = tmp_path / "run"
    find(tiny_circuit(files), folder, means)
    other = tiny_backbone(seed=1)
    other.model.save_pretrained(files / "base2")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model": str(files / "base2")}))
    other.tokenizer.save_pretrained(files / "base2")
    with pytest.raises(CircuitError, match="found on a base with fingerprint"):
        edit(folder, means)
