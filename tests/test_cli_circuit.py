"""`paving circuit` from pairs to a verified checkpoint and back, as a user types it; every refusal is one line."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file

from command_line import paving, printed, refused
from paving.circuit.arithmetic import ArithmeticConfig
from paving.circuit.attribution import AttributionConfig
from paving.circuit_run.config import RECIPES, StrengthConfig
from paving.cli_circuit import circuit_config
from tiny_models import tiny_backbone
from tiny_pairs import COMPLYING, REFUSING, tiny_pairs, write_pairs

QUICK = {
    "calibration": 3,
    "arithmetic": {"epochs": 1, "learning_rate": 1e-2},
    "strength": {"alphas": [0.5, 1.0], "limit": 1.0, "max_new_tokens": 2},
    "decoding": {"max_new_tokens": 3},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Base, pairs, and two finished circuit runs, of the categories harm and other."""
    folder = tmp_path_factory.mktemp("circuits")
    backbone = tiny_backbone()
    backbone.model.save_pretrained(folder / "base")
    backbone.tokenizer.save_pretrained(folder / "base")
    for name, pairs in (("train", tiny_pairs(9)), ("test", tiny_pairs(5, seed=9))):
        rows = [{"id": p.id, "base": p.benign, "harm": p.harmful, "other": f"w9 {p.harmful}"} for p in pairs]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    (folder / "openings.json").write_text(json.dumps({"refusal": REFUSING, "compliance": COMPLYING}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({**QUICK, "openings": str(folder / "openings.json")}), encoding="utf-8")
    for category in ("harm", "other"):
        printed(
            "circuit", "find", "--out", folder / category, "--config", folder / "config.json", "--model", folder / "base",
            "--pairs", folder / "train.jsonl", "--held-out", folder / "test.jsonl", "--category", category,
        )  # fmt: skip
        assert "delta:" in printed("circuit", "edit", folder / category, "--alpha", "1")
    return folder


def test_find_says_how_large_the_circuit_is_and_a_second_run_changes_nothing(made):
    text = printed(
        "circuit", "find", "--out", made / "harm", "--config", made / "config.json", "--model", made / "base",
        "--pairs", made / "train.jsonl", "--held-out", made / "test.jsonl", "--category", "harm",
    )  # fmt: skip
    assert "circuit: 35 neurons in 5 layers" in text


def test_evaluate_prints_every_set_and_writes_a_report(made):
    text = printed("circuit", "evaluate", made / "harm")
    assert "c-delta-theta" in text and "base" in text and "benign" in text
    metrics = json.loads(printed("circuit", "evaluate", made / "harm", "--json"))
    assert [r["name"] for r in metrics["rows"]] == ["base", "c-delta-theta"]
    (made / "harm" / "report.html").unlink()
    assert "report: " in printed("report", made / "harm")
    assert (made / "harm" / "report.html").exists()


def test_commands_for_controllers_say_what_a_circuit_run_is(made):
    for command in ("eval", "diagnose"):
        assert "is a circuit's run, not a controller's" in refused(command, made / "harm")


def test_a_recipe_is_laid_over_a_file_block_by_block(made, tmp_path):
    file = tmp_path / "config.json"
    own = {"batch_size": 4, "retain": "ce", "epochs": 5}
    file.write_text(json.dumps({"pairs": "p", "category": "c", "arithmetic": own}), encoding="utf-8")
    options = dict.fromkeys(("seed", "reading"))
    selective = circuit_config(file, "selective", **options).arithmetic
    assert selective.batch_size == 4 and selective.retain == RECIPES["selective"]["arithmetic"]["retain"]
    published = circuit_config(file, "published", **options).arithmetic
    assert published == ArithmeticConfig(batch_size=4)  # the paper's, whatever the file had
    finished = tmp_path / "finished.json"  # a run's own configuration, with all that the recipe had set
    finished.write_text(circuit_config(file, "selective", **options).model_dump_json(), encoding="utf-8")
    again = circuit_config(finished, "published", **options)
    assert (again.fraction, again.strength.alphas, again.attribution) == (0.15, StrengthConfig().alphas, AttributionConfig())
    assert circuit_config(file, None, **options).arithmetic.retain == "ce"


@pytest.mark.parametrize("content", ["[1]", '{"arithmetic": "fast"}'])
def test_a_configuration_of_another_shape_is_one_line(made, tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    assert "is no CircuitConfig" in refused(
        "circuit", "find", "--out", tmp_path / "x", "--config", tmp_path / "config.json", "--seed", "3",
        "--recipe", "selective", "--pairs", made / "train.jsonl", "--category", "harm",
    )  # fmt: skip


def test_apply_verify_remove(made, tmp_path):
    delta, edited, restored = made / "harm" / "delta", tmp_path / "edited", tmp_path / "restored"
    text = printed("circuit", "apply", made / "base", delta, "--out", edited)
    assert "proved to differ from the base in the circuit alone" in text
    weaker = printed("circuit", "apply", made / "base", delta, "--out", tmp_path / "weaker", "--alpha", "0.25")
    assert "--alpha 0.25 --json" in weaker.replace("\n", " ")
    text = printed("circuit", "verify", made / "base", edited, delta)
    assert "verified: " in text and "values changed, all in the circuit (5 of 57 tensors)" in text
    printed("circuit", "remove", edited, delta, "--out", restored)
    base, again = load_file(made / "base" / "model.safetensors"), load_file(restored / "model.safetensors")
    assert base.keys() == again.keys() and all(base[k].equal(again[k]) for k in base)
    (edited / "model.safetensors").write_bytes(flipped((edited / "model.safetensors").read_bytes()))
    result = paving("circuit", "verify", made / "base", edited, delta)
    assert result.exit_code == 1 and "is not" in result.stderr and "Traceback" not in result.output
    assert result.stderr.count("Error:") == 1
    found = json.loads(paving("circuit", "verify", made / "base", edited, delta, "--json").stdout)
    assert found["ok"] is False and found["findings"]


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def test_compose_and_take_out_again(made, tmp_path):
    both, back = tmp_path / "both", tmp_path / "back"
    text = printed("circuit", "compose", made / "harm" / "delta", made / "other" / "delta", "--out", both)
    assert "delta of harm, other" in text
    assert "delta of other" in printed("circuit", "compose", both, "--without", "harm", "--out", back)
    for name, options in {"kept": (), "mean": ("--overlap", "mean")}.items():
        printed("circuit", "compose", both, *options, "--out", tmp_path / name)
        said = json.loads((tmp_path / name / "delta.json").read_text(encoding="utf-8"))["composition"]["overlap"]
        assert said == ("mean" if options else "largest")
    printed("circuit", "compose", tmp_path / "mean", "--scale", "0.5", "--out", tmp_path / "weaker")
    weaker = json.loads((tmp_path / "weaker" / "delta.json").read_text(encoding="utf-8"))
    assert weaker["composition"]["overlap"] == "mean"  # its own, unless another is asked for
    printed("circuit", "apply", made / "base", back, "--out", tmp_path / "a")
    printed("circuit", "apply", made / "base", made / "other" / "delta", "--out", tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_composition_is_measured_by_the_run_of_each_category_and_its_card_says_so(made, tmp_path):
    both = tmp_path / "both"
    printed("circuit", "compose", made / "harm" / "delta", made / "other" / "delta", "--out", both)
    unmeasured = tmp_path / "unmeasured"
    printed("circuit", "apply", made / "base", both, "--out", unmeasured)
    assert "paving circuit evaluate RUN --delta DELTA" in (unmeasured / "README.md").read_text(encoding="utf-8")
    for category in ("harm", "other"):
        run = shutil.copytree(made / category, tmp_path / f"run-{category}")
        other = made / {"harm": "other", "other": "harm"}[category] / "delta"
        said = printed("circuit", "evaluate", run, "--delta", both, "--delta", other)
        assert "both" in said
        metrics = json.loads(printed("circuit", "evaluate", run, "--json"))  # they stay
        assert [r["name"] for r in metrics["rows"]][:4] == ["base", "c-delta-theta", "both", other.parent.name]
        assert metrics["deltas"]["both"] == "../both"  # seen from the run: the two may move together
    printed("circuit", "apply", made / "base", both, "--out", tmp_path / "edited")
    card = (tmp_path / "edited" / "README.md").read_text(encoding="utf-8")
    assert all(f"| {said} |" in card for said in ("refusal of harm", "refusal of other", "benign over refusal"))
    assert "was not measured" not in card
    figures = json.loads((both / "delta.json").read_text(encoding="utf-8"))["composition"]["metrics"]
    assert "refusal_of_harm" in figures and "harm_broken" in figures  # of each run its own category
    before = {p: p.read_bytes() for p in (tmp_path / "run-harm" / "sets").rglob("both.jsonl")}
    shutil.rmtree(both)
    printed("circuit", "compose", made / "harm" / "delta", made / "other" / "delta", "--scale", "0.01", "--out", both)
    text = printed("circuit", "evaluate", tmp_path / "run-harm", "--delta", both)  # another composition in the same place
    after = {p: p.read_bytes() for p in (tmp_path / "run-harm" / "sets").rglob("both.jsonl")}
    assert "both" in text and before.keys() == after.keys() and after != before
    single = json.loads((made / "other" / "delta" / "delta.json").read_text(encoding="utf-8"))
    assert "refusal_of_harm" not in single["components"][0]["metrics"]  # another run's row leaves a single delta alone
    shutil.move(both, tmp_path / "elsewhere")
    assert "left out: the row both" in paving("circuit", "evaluate", tmp_path / "run-harm").stderr
    (tmp_path / "base").mkdir()
    assert "another row is called base" in refused(
        "circuit", "evaluate", tmp_path / "run-harm", "--delta", tmp_path / "base"
    )


def test_refusals_are_one_line(made, tmp_path):
    assert "--category is missing" in refused("circuit", "find", "--out", tmp_path / "x", "--pairs", made / "train.jsonl")
    assert "no pairs for the category" in refused(
        "circuit", "find", "--out", tmp_path / "x", "--pairs", made / "train.jsonl", "--category", "crime"
    )
    assert "allowed: published, selective" in refused(
        "circuit", "find", "--out", tmp_path / "x", "--pairs", made / "train.jsonl", "--category", "harm", "--recipe", "best"
    )
    assert not (tmp_path / "x").exists()
    assert "no config.json" in refused("circuit", "edit", tmp_path)
    assert "is not known; allowed" in refused("circuit", "evaluate", made / "harm", "--against", "caa")
    other = tiny_backbone(seed=3)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    delta = made / "harm" / "delta"
    assert "fingerprint" in refused("circuit", "apply", tmp_path / "other", delta, "--out", tmp_path / "y")
    assert "exists" in refused("circuit", "apply", made / "base", delta, "--out", made / "harm")
    write_pairs(tmp_path / "broken.jsonl", tiny_pairs(2))
    (tmp_path / "broken.jsonl").write_text("{oops\n", encoding="utf-8")
    assert "broken.jsonl:1 is not JSON" in refused(
        "circuit", "find", "--out", tmp_path / "x", "--pairs", tmp_path / "broken.jsonl", "--category", "harm"
    )
