"""What a saved sweep is named by: everything that decides it, so that none is taken for another."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from stand_in import Fitted, stand_in

from paving.compare import compare, methods, sweep
from paving.compare.bench import Bench, open_bench
from paving.compare.fitting import Fitting
from paving.compare.sweep import Decoded
from paving.evaluation.judges import Label, Verdict
from paving.prompts.types import Bucket, Prompt, SplitName, Splits
from paving.run_folder import RunConfig, write_text
from paving.steering.checks import SteeringError
from tiny_models import tiny_backbone
from tiny_runs import WordJudge

USABLE = "w1 w2 w33"  # of an odd length: no refusal, to WordJudge


@pytest.fixture(scope="module")
def bench(setting, evaluated, tmp_path_factory) -> Bench:
    folder = tmp_path_factory.mktemp("keys") / "run"
    shutil.copytree(evaluated, folder)
    return open_bench(folder, setting[1], WordJudge())


def configured(bench: Bench, **changes: object) -> Bench:
    return replace(bench, config=RunConfig.model_validate(bench.config.model_dump() | changes))


def first_prompt(bench: Bench, split: str, **changes: object) -> Bench:
    first, *others = getattr(bench.splits, split)
    return replace(bench, splits=replace(bench.splits, **{split: (replace(first, **changes), *others)}))


def elsewhere(bench: Bench) -> str:
    """The same model, by another name."""
    folder = bench.folder.with_name("another-model")
    shutil.copytree(bench.config.model, folder, dirs_exist_ok=True)
    return str(folder)


def with_own_targets(bench: Bench, targets: Callable[[Prompt], str]) -> Bench:
    """Every edit prompt of training and calibration with a target of its owner's; no prompt is held out."""
    splits = Splits(
        *(tuple(replace(p, target=targets(p)) for p in split) for split in (bench.splits.train, bench.splits.calibration)),
        (),
    )
    training = bench.config.training.model_dump() | {"targets": "own", "horizon": 12}
    return replace(configured(bench, training=training, targets_from=None), splits=splits)


CHANGES = {
    "a training prompt's text": lambda b: first_prompt(b, "train", text="something else"),
    "a calibration prompt's text": lambda b: first_prompt(b, "calibration", text="something else"),
    "what a prompt is asked with": lambda b: first_prompt(b, "train", system="You are brief."),
    "a target of the owner's": lambda b: first_prompt(b, "train", target="another answer"),
    "a source": lambda b: first_prompt(b, "train", source="elsewhere"),
    "a group": lambda b: first_prompt(b, "train", group="another"),
    "a bucket": lambda b: first_prompt(b, "train", bucket=Bucket.HARMFUL_KEEP),
    "one prompt more": lambda b: replace(
        b,
        splits=Splits(
            (*b.splits.train, Prompt("more", "one more", Bucket.BENIGN_KEEP, group="more")), b.splits.calibration, ()
        ),
    ),
    "the length of answers": lambda b: configured(b, decoding={"max_new_tokens": 3}),
    "the length of targets": lambda b: configured(b, training=b.config.training.model_dump() | {"horizon": 5}),
    "where targets come from": lambda b: configured(b, training=b.config.training.model_dump() | {"targets": "own"}),
    "the model that gives targets": lambda b: configured(b, targets_from=elsewhere(b)),
    "the base": lambda b: replace(b, backbone=tiny_backbone(seed=5)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_sweep_of_other_inputs_has_another_name(bench, what):
    one = Fitting(methods.METHODS[0], bench)
    other = Fitting(methods.METHODS[0], CHANGES[what](bench))
    assert other.key != one.key
    assert Fitting(methods.METHODS[0], replace(bench)).key == one.key  # and of the same inputs the same


@dataclass(frozen=True)
class Stricter(WordJudge):
    """To whom answers to `bucket` are of another label, where WordJudge sees no refusal."""

    name: str = "stricter"
    bucket: Bucket = Bucket.HARMFUL_KEEP
    label: Label = Label.HARMFUL

    def judge(self, prompt, response, bucket, *, truncated=False):
        found = super().judge(prompt, response, bucket, truncated=truncated)
        milder = bucket is not self.bucket or found.label is Label.HARMLESS_REFUSAL
        return found if milder else Verdict(self.label, "strict")


def test_another_judge_reads_the_answers_that_are_there(bench, monkeypatch):
    method = stand_in(scales=(1.0,))
    before = sweep.open_answers(bench, Fitting(method, bench), 1.0)
    other = replace(bench, judge=Stricter())
    monkeypatch.setattr(sweep, "generate", lambda *a, **k: pytest.fail("decoded again"))
    after = sweep.open_answers(other, Fitting(replace(method, fit=lambda *a: pytest.fail("fitted again")), other), 1.0)
    assert after.divergence == before.divergence
    keeps = {p.id for p in bench.calibration[Bucket.HARMFUL_KEEP]}
    changed = {i for i, label in after.labels.items() if label != before.labels[i]}
    assert changed and changed == {i for i in keeps if before.labels[i] == Label.HARMLESS_BENIGN}


def test_a_judge_to_whom_other_targets_can_be_used_gives_other_fits(bench):
    own = with_own_targets(bench, lambda p: USABLE)
    strict = replace(own, judge=Stricter("of-targets", Bucket.EDIT, Label.HARMLESS_BROKEN))
    assert strict.material.unusable > own.material.unusable == frozenset()
    assert Fitting(methods.METHODS[0], strict).key != Fitting(methods.METHODS[0], own).key


def test_what_nothing_is_fitted_for_asks_no_judge(bench):
    """The run's own sweeps, probes and held-out targets: the same names whatever a judge says of targets, and unasked."""

    class Silent(WordJudge):
        def judge(self, *arguments, **options):
            pytest.fail("asked")

    assert replace(bench, judge=Silent("silent")).key(editor="own") == bench.key(editor="own")


def test_a_scale_that_drives_the_model_out_of_its_numbers_is_decoded_once(tmp_path):
    path = tmp_path / "sweeps" / "method@64.json"
    decoded = Decoded(key="k", answers=(), divergence={"far": float("nan"), "further": float("inf"), "near": 0.5}, note="")
    write_text(path, decoded.model_dump_json(indent=0))
    there = sweep._saved(path, "k").divergence
    assert math.isnan(there["far"]) and there["further"] == math.inf and there["near"] == 0.5


def test_held_out_prompts_name_no_sweep(bench):
    assert Fitting(methods.METHODS[0], first_prompt(bench, "held_out", text="something else")).key == (
        Fitting(methods.METHODS[0], bench).key
    )


def test_a_method_of_another_version_and_a_probe_made_in_another_way_have_other_names(bench, monkeypatch):
    method = methods.METHODS[0]
    raised = replace(method, version=method.version + 1)
    assert Fitting(raised, bench).key != Fitting(method, bench).key
    before = {variant: bench.routing_key(variant) for variant in ("global", "probe", "probe+veto", "oracle")}
    monkeypatch.setattr("paving.compare.bench.ROUTING_VERSION", 99)
    changed = {variant for variant, key in before.items() if bench.routing_key(variant) != key}
    assert changed == {"probe", "probe+veto"}


def test_a_target_that_refuses_or_loops_chooses_nothing(bench):
    looping, *others = [p.id for p in bench.splits.calibration if p.bucket is Bucket.EDIT]
    assert others

    material = with_own_targets(bench, lambda p: " ".join(["w1"] * 8) if p.id == looping else USABLE).material
    assert looping in material.unusable and not material.unusable & set(others)
    assert looping not in {p.id for p in material.with_target(SplitName.CALIBRATION)}
    assert looping in {p.id for p in material.of(SplitName.CALIBRATION, Bucket.EDIT)}
    none = replace(material, unusable=frozenset([looping, *others]))
    with pytest.raises(SteeringError, match="refuse, loop or break off"):
        none.with_target(SplitName.CALIBRATION)


def test_a_fit_that_takes_long_is_made_once_for_a_comparison_that_was_killed(setting, evaluated, tmp_path):
    shutil.copytree(evaluated, tmp_path / "run")
    kept, loads = {}, []

    def load(path, _backbone):
        loads.append(path)
        return kept[path]

    def save(editor, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        kept[path] = editor

    fit = Fitted()
    method = stand_in("slow", fit, stored=methods.Stored(save, load))
    first = Fitting(method, open_bench(tmp_path / "run", setting[1], WordJudge())).editor  # and killed
    assert Fitting(method, open_bench(tmp_path / "run", setting[1], WordJudge())).editor is first
    assert len(fit.materials) == len(loads) == 1
    raised = replace(method, version=2)
    assert Fitting(raised, open_bench(tmp_path / "run", setting[1], WordJudge())).editor is not first
    compare(tmp_path / "run", setting[1], judge=WordJudge(), table=(method,))
    left = {p.stem for p in (tmp_path / "run" / "comparison" / "fits").iterdir()}
    assert left == {Fitting(raised, open_bench(tmp_path / "run", setting[1], WordJudge())).key}  # another's stays

    def full(_editor, _path):
        raise SteeringError("no space left")

    said = []
    means = replace(setting[1], say=said.append)
    unkept = stand_in("slow", Fitted(), stored=methods.Stored(full, load), version=3)
    assert Fitting(unkept, open_bench(tmp_path / "run", means, WordJudge())).editor is not None
    assert "the fit of slow is not kept: no space left" in said
