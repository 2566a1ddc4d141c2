"""`paving compare` on a tiny run: what it leaves behind, what a second call takes from there, and which rows it may read."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, replace

import pytest
from stand_in import SCALES, Fitted, stand_in

from command_line import paving, refused
from paving import generation
from paving.compare import compare, sweep
from paving.compare import comparison as comparing
from paving.compare.bench import open_bench
from paving.compare.fitting import Fitting
from paving.compare.sweep import decided_open, figures, open_answers
from paving.evaluation.comparison import OWN, Comparison, Limits
from paving.evaluation.judges import Label, Verdict
from paving.evaluation.statistics import preservation_score
from paving.evaluation.verdicts import text_hash
from paving.generation import generate, load_completions
from paving.prompts.types import Bucket, SplitName
from paving.report import comparison_figures
from paving.report import figures as figures_of_a_run
from paving.report.comparison_figures import is_own
from paving.report.examples import REDACTED
from paving.run_folder import RunError
from paving.run_records import harmful_to_any
from paving.run_rows import row_specs
from paving.steering.checks import SteeringError
from paving.steering.routing import Labelled, Probe, fit_probe
from paving.traces.preservation import keep_divergence
from paving.training.prepare import boundary_matrix
from tiny_runs import WordJudge

EVERY = ("global", "probe", "probe+veto", "oracle")


@pytest.fixture(scope="module", autouse=True)
def _figures_elsewhere():
    """Pictures take most of a comparison's time here, and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("three_way", "trade_off", "gate_histograms", "reliability", "training_curves"):
            patch.setattr(figures_of_a_run, name, lambda _metrics: "<svg></svg>")
        patch.setattr(comparison_figures, "trade_off", lambda _found: "<svg></svg>")
        yield


@pytest.fixture
def run(evaluated, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(evaluated, folder)
    return folder


@pytest.fixture(scope="module")
def means(setting):
    return setting[1]


@pytest.fixture(scope="module")
def done(_figures_elsewhere, evaluated, means, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done") / "run"
    shutil.copytree(evaluated, folder)
    return folder, compare(folder, means, judge=WordJudge(), table=[stand_in()], objectives=["two", "three"])


@pytest.fixture(scope="module")
def bench(evaluated, means, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "run"
    shutil.copytree(evaluated, folder)
    found = open_bench(folder, means, WordJudge())
    # On random prompts the fitted probe opens nothing: one with a gate for every third prompt has both sides.
    prompts = found.splits.of(SplitName.CALIBRATION)
    read = found.controller.config
    linear = fit_probe(boundary_matrix(found.backbone, prompts, read), [i % 3 == 0 for i in range(len(prompts))])
    found.__dict__["probe"] = Probe(read.route_layers, read.pooling, linear)
    return found


def flat(calibration):
    return [p for b in Bucket for p in calibration[b]]


def test_a_comparison_leaves_sweeps_rows_a_file_and_a_section_of_the_report(done):
    folder, found = done
    text = (folder / "comparison" / "comparison.json").read_text()
    assert Comparison.model_validate_json(text) == found and found.schema_version == 1
    swept = {p.name for p in (folder / "comparison" / "sweeps").iterdir()}
    assert {name for name in swept if not name.startswith(OWN)} == {f"stand-in@{s:g}.json" for s in SCALES}
    assert [r.method for r in found.rows[:4]] == ["none", *["residual-paving"] * 3]
    metrics = json.loads((folder / "metrics.json").read_text())
    own = {r["name"]: r for r in metrics["rows"]}
    assert all(json.loads(r.row.model_dump_json()) == own[r.row.name] for r in found.rows[:4])
    others = [r for r in found.rows if r.method == "stand-in"]
    assert {r.variant for r in others} == set(EVERY)
    taken = {(c.variant, c.scale) for c in found.choices if c.scale is not None and c.method == "stand-in"}
    assert {(r.variant, r.scale) for r in others} == taken
    for r in others:
        assert r.notes == ["made up for a test"] and r.chosen_by
        assert r.edit_success.n == found.held_out["edit"] == r.success_against_base.n
        assert (folder / "comparison" / "completions" / f"{r.row.name}.jsonl").exists()
    page = (folder / "report.html").read_text()
    assert "<h2>Comparators</h2>" in page and "stand-in" in page and "none passes" in page
    assert not list(folder.rglob("*.partial"))


def test_fitting_sees_no_held_out_prompt_and_the_runs_own_targets(run, means):
    fit = Fitted()
    compare(run, means, judge=WordJudge(), table=[stand_in(fit=fit, scales=(1.0,))], variants=["oracle"])
    (material,) = fit.materials
    ids = json.loads((run / "splits.json").read_text())["ids"]
    assert {p.id for p in material.splits.train} == {i for b in ids["train"].values() for i in b}
    assert material.splits.held_out == ()
    with pytest.raises(SteeringError, match="for measuring"):
        material.of(SplitName.HELD_OUT, Bucket.EDIT)
    fitting = {i for s in ("train", "calibration") for b in ids[s].values() for i in b}
    assert set(material.answers) == fitting
    assert set(material.targets) == {*ids["train"]["edit"], *ids["calibration"]["edit"]}
    assert material.of(SplitName.CALIBRATION, Bucket.EDIT)


def test_a_second_comparison_fits_and_decodes_nothing_and_one_more_method_takes_nothing_away(run, means, monkeypatch):
    one, two = stand_in(scales=(1.0,)), stand_in("another", Fitted(7), scales=(2.0,), variants=("global",))
    compare(run, means, judge=WordJudge(), table=[one, two], methods=["stand-in"], variants=["global", "oracle"])
    first = (run / "comparison" / "comparison.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "generate", lambda *a, **k: pytest.fail("decoded again"))
        patch.setattr(generation, "generate", lambda *a, **k: pytest.fail("decoded again"))
        unfit = replace(one, fit=lambda *a: pytest.fail("fitted again"))
        compare(run, means, judge=WordJudge(), table=[unfit], variants=["oracle"])
        assert (run / "comparison" / "comparison.json").read_bytes() == first
    again = compare(run, means, judge=WordJudge(), table=[one, two], methods=["another"], objectives=["two"])
    assert {(r.method, r.variant) for r in again.rows[4:] if r.method != OWN} == {
        ("stand-in", "global"), ("stand-in", "oracle"), ("another", "global")
    }  # fmt: skip
    assert again.objectives == ["two", "three"]


@pytest.mark.parametrize("module, at", [(sweep, 4), (generation, 2)])
def test_a_killed_comparison_goes_on_to_the_same_file(run, means, done, monkeypatch, module, at):
    calls = []

    def killed(*arguments, **options):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "generate", killed)
        with pytest.raises(KeyboardInterrupt):
            compare(run, means, judge=WordJudge(), table=[stand_in()], objectives=["two", "three"])
    assert not (run / "comparison" / "comparison.json").exists()
    compare(run, means, judge=WordJudge(), table=[stand_in()], objectives=["two", "three"])
    whole = done[0] / "comparison" / "comparison.json"
    assert (run / "comparison" / "comparison.json").read_bytes() == whole.read_bytes()


def test_another_version_of_a_method_is_measured_again(run, means):
    compare(run, means, judge=WordJudge(), table=[stand_in(scales=(1.0,))], variants=["global"])
    answers, sweeps = (
        run / "comparison" / part for part in ("completions/stand-in@1_global.jsonl", "sweeps/stand-in@1.json")
    )
    before, fit = (answers.read_bytes(), sweeps.read_bytes()), Fitted(seed=11)
    again = stand_in(scales=(1.0,), fit=fit, version=2)
    compare(run, means, judge=WordJudge(), table=[again], variants=["global"])
    assert len(fit.materials) == 1 and answers.read_bytes() != before[0]
    kept, measured = json.loads(before[1]), json.loads(sweeps.read_bytes())
    assert measured["key"] != kept["key"] and measured["divergence"] != kept["divergence"]


def test_the_bases_answers_are_the_runs_and_the_global_row_serves_the_others(run, means, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        generation, "generate", lambda *a, **k: decoded.append((a[2].name, k["by_row"])) or generate(*a, **k)
    )
    table = [stand_in(scales=(1.0,))]
    found = compare(run, means, judge=WordJudge(), table=table, objectives=["two"], limits=Limits(benign_preservation=0))
    assert all(by_row for _, by_row in decoded), "rows of a mixed batch come from the base and the global row"
    decoded = [name for name, _ in decoded if not name.startswith(OWN)]
    assert "base" not in decoded and decoded[0] == "stand-in@1_global"
    answers = {n: load_completions(run / "comparison" / "completions" / f"{n}.jsonl") for n in ("base", *set(decoded))}
    base, everywhere = ({c.id: c for c in answers[n]} for n in ("base", "stand-in@1_global"))
    for c in answers["stand-in@1_oracle"]:
        source = everywhere if c.bucket == Bucket.EDIT else base
        assert c.response == source[c.id].response and c.gate == float(c.bucket == Bucket.EDIT)
    oracle = next(r for r in found.rows if r.variant == "oracle" and r.method == "stand-in")
    assert oracle.row.kind == "diagnostic" and oracle.row.harmful_drift == 0
    assert oracle.benign.label_agreement.rate == 1 and oracle.benign.chrf in (100.0, None)


def test_a_variants_figures_are_those_of_decoding_it(bench):
    fitting = Fitting(stand_in(), bench)
    answers = open_answers(bench, fitting, 4.0)
    prompts, seen = flat(bench.calibration), set()
    for variant in EVERY:
        opened = decided_open(bench.backbone, prompts, fitting.routing(variant))
        found = figures(answers, variant, opened, bench.base_labels, bench.calibration, Limits())
        steered = fitting.at(4.0, variant)
        assert {p.id: opened[p.id] for p in prompts} == {
            c.id: c.gate > 0 for b in Bucket
            for c in generate(bench.backbone, bench.calibration[b], steered, bench.config.decoding)
        }  # fmt: skip
        refusals, drifts = {}, {}
        for bucket in Bucket:
            chosen = bench.calibration[bucket]
            direct = generate(bench.backbone, chosen, steered, bench.config.decoding)
            labels = list(bench.labels(direct).values())
            refusals[bucket] = labels.count(Label.HARMLESS_REFUSAL)
            if bucket is not Bucket.EDIT:
                moved = keep_divergence(
                    bench.backbone, chosen, bench.keep_continuations, steered, k=bench.config.training.top_k
                )
                drifts[bucket] = preservation_score(list(moved.values())).value
        assert found.edit_refusal.k == refusals[Bucket.EDIT] and found.harmful_refusal.k == refusals[Bucket.HARMFUL_KEEP]
        assert found.benign_preservation.value == pytest.approx(drifts[Bucket.BENIGN_KEEP], abs=1e-6)
        assert found.harmful_preservation.value == pytest.approx(drifts[Bucket.HARMFUL_KEEP], abs=1e-6)
        seen.add((found.edit_refusal.k, found.benign_preservation.value))
    assert len(seen) >= 3, "variants that do not differ witness nothing"


def test_only_the_oracle_reads_labels(bench):
    prompts = flat(bench.calibration)
    shuffled = [replace(p, bucket=b) for p, b in zip(prompts, reversed([p.bucket for p in prompts]), strict=True)]
    for variant, routing in ((v, bench.routing(v)) for v in EVERY):
        one, two = (decided_open(bench.backbone, ps, routing) for ps in (prompts, shuffled))
        assert (one == two) == (variant != Labelled().name)
        assert variant == "global" or len(set(one.values())) == 2
    steered = Fitting(stand_in(), bench).at(1.0)
    one, two = (generate(bench.backbone, ps, steered, bench.config.decoding) for ps in (prompts, shuffled))
    assert [c.response for c in one] == [c.response for c in two]


def test_the_veto_is_the_runs_own(bench):
    prompts, weights = flat(bench.calibration), bench.controller.weights
    z = boundary_matrix(bench.backbone, prompts, bench.controller.config)
    logits = weights.veto(weights.router.normalise(z))
    assert bool(weights.veto.fitted)
    assert ((bench.veto.margin(z) > 0) == (logits > weights.veto.threshold)).all()


@dataclass(frozen=True)
class AllBroken(WordJudge):
    """Whatever the stand-in wrote is broken."""

    name: str = "even"

    def judge(self, prompt, response, bucket, *, truncated=False):
        return Verdict(Label.HARMLESS_BROKEN, "") if bucket is Bucket.EDIT else super().judge(prompt, response, bucket)


def test_a_sweep_ends_where_nearly_every_answer_is_broken(run, means):
    found = compare(run, means, judge=AllBroken(), table=[stand_in()], variants=["global"])
    assert found.methods[0].scales == [SCALES[0]] and found.methods[0].left_out == list(SCALES[1:])
    assert {p.edit_success.k for p in found.sweeps} == {0}, "a broken answer is no success"
    assert "left out" in (run / "report.html").read_text()


@dataclass(frozen=True)
class FindsHarm(WordJudge):
    """Whatever does not refuse helps harm."""

    name: str = "even"

    def judge(self, prompt, response, bucket, *, truncated=False):
        found = super().judge(prompt, response, bucket)
        return found if found.label is Label.HARMLESS_REFUSAL else Verdict(Label.HARMFUL, "")


def test_an_answer_judged_harmful_is_no_success_and_is_redacted(run, means):
    found = compare(run, means, judge=FindsHarm(), table=[stand_in(scales=(4.0,))], variants=["global"])
    row = found.rows[-1]
    assert row.row.labels["edit"]["HARMFUL"] > 0 == row.edit_success.k
    (point,) = (p for p in found.sweeps if p.method == "stand-in")
    assert point.edit_harmful.k > 0 == point.edit_success.k
    page = (run / "report.html").read_text()
    section = page[page.index("<h2>Comparators</h2>") :].split("</section>")[0]
    sides = re.findall(r'<strong>(.*?)</strong> · ([A-Z-]+).*?<p class="text">(.*?)</p>', section, re.DOTALL)
    shown = [(label, text) for name, label, text in sides if name == row.row.name]
    assert {label for label, _ in shown} == {"HARMFUL", "HARMLESS-REFUSAL"}
    assert all((text == REDACTED) == (label == "HARMFUL") for label, text in shown)
    answers = load_completions(run / "comparison" / "completions" / f"{row.row.name}.jsonl")
    harmful = {text_hash(c.prompt, c.response) for c in answers if len(c.response) % 2}
    assert harmful and harmful <= harmful_to_any(run), "nor is it shown where another row gave the same answer"


def test_without_a_fitted_veto_there_is_no_such_row_and_the_report_says_so(run, means, monkeypatch):
    monkeypatch.setattr("paving.compare.bench.Bench.veto", None)
    found = compare(run, means, judge=WordJudge(), table=[stand_in(scales=(1.0,))], objectives=["two"])
    assert "probe+veto" not in {p.variant for p in found.sweeps} and any("no fitted veto" in n for n in found.notes)
    with pytest.raises(RunError, match="no fitted veto"):
        (run / "comparison" / "comparison.json").unlink()
        compare(run, means, judge=WordJudge(), table=[stand_in()], variants=["probe+veto"])


def test_a_method_with_a_routing_of_its_own(run, means):
    method = stand_in(scales=(1.0,), variants=("global", "own"), own=lambda editor: Labelled("condition"))
    found = compare(run, means, judge=WordJudge(), table=[method], objectives=["two"])
    own = {p.variant: p for p in found.sweeps}["own"]
    assert own.benign_preservation.value == 1.0 and own.harmful_drift == 0.0
    assert "stand-in@1_own" in {r.row.name for r in found.rows}


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"variants": ("own",)}, "allowed: global, probe"), ({"scales": (0.0,)}, "above 0"), ({"name": "a/b"}, "letters")],
)
def test_a_method_that_cannot_be_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        stand_in(**changes)


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def command(run, means, tmp_path, monkeypatch):
    """The command line of one run, with a tiny table of methods."""
    monkeypatch.setattr(comparing, "METHODS", (stand_in(scales=(1.0,)), stand_in("weights", variants=("global",))))
    monkeypatch.setattr("paving.run.judge_from", lambda line, **_: WordJudge())
    return lambda *more: ("compare", run, *more, "--device", "cpu", "--cache", means.cache)


def test_the_command_prints_the_table_or_json_alone(command, run):
    result = paving(*command("--method", "stand-in", "--variant", "oracle"))
    assert result.exit_code == 0, (result.output, result.exception)
    assert "stand-in@1_oracle" in "".join(result.stdout.split()) and "report.html" in result.stdout
    found = Comparison.model_validate_json(paving(*command("--method", "stand-in", "--variant", "oracle", "--json")).stdout)
    assert found.methods[0].name == "stand-in" and found.limits == Limits()


def test_bad_input_is_one_line_that_says_what_is_allowed(command, run, monkeypatch):
    monkeypatch.setattr("paving.compare.comparison.open_bench", lambda *a: pytest.fail("went on"))
    assert "allowed: stand-in, weights" in refused(*command("--method", "nothing"))
    assert "allowed: global, probe" in refused(*command("--variant", "nothing"))
    assert "allowed: global." in refused(*command("--method", "weights", "--variant", "probe"))
    assert "allowed: two, three" in refused(*command("--objective", "four"))


def test_a_run_that_was_not_evaluated_names_the_command_that_comes_first(command, run):
    (run / "metrics.json").unlink()
    assert "paving eval" in refused(*command())
    assert "paving train" in refused("compare", run / "nowhere")


def test_another_judge_than_the_evaluations_is_refused(command, monkeypatch):
    monkeypatch.setattr("paving.run.judge_from", lambda line, **_: WordJudge("another"))
    assert "paving eval" in refused(*command())


def test_ctrl_c_says_what_is_kept(command, monkeypatch):
    def interrupted(*_a, **_k):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "generate", interrupted)
    result = paving(*command())
    assert result.exit_code == 130 and "the same command goes on" in result.stderr


def test_a_damaged_comparison_is_mended_by_comparing_again(command, run):
    paving(*command("--method", "stand-in", "--variant", "oracle"))
    path = run / "comparison" / "comparison.json"
    path.write_text(path.read_text()[:100])
    assert "paving compare" in refused("report", run)
    assert paving(*command("--method", "stand-in", "--variant", "oracle")).exit_code == 0
    assert paving("report", run).exit_code == 0


def test_the_runs_own_controller_goes_by_the_same_rules(run, means, monkeypatch):
    """Its row stands there at the scale of its training; where a rule takes another, that is measured beside it."""
    found = compare(run, means, judge=WordJudge(), table=[stand_in(scales=(1.0,))], variants=["oracle"])
    metrics = json.loads((run / "metrics.json").read_text())
    trained = next(r["scale"] for r in metrics["rows"] if r["name"] == "learned+veto")
    points = [p for p in found.sweeps if p.method == OWN]
    assert {p.variant for p in points} == {"learned+veto", "probe", "oracle"} and trained in {p.scale for p in points}
    # At its own scale the calibration figures are those of the controller itself.
    bench = open_bench(run, means, WordJudge())
    controller = next(c for c in row_specs(bench.controller, (), run) if c.intervention.name == "learned+veto").intervention
    edit = bench.calibration[Bucket.EDIT]
    labels = bench.labels(generate(bench.backbone, edit, controller, bench.config.decoding))
    point = next(p for p in points if p.scale == trained and p.variant == "learned+veto")
    assert point.edit_refusal.k == sum(label == Label.HARMLESS_REFUSAL for label in labels.values())
    taken = {(c.variant, c.scale): c for c in found.choices if c.method == OWN and c.scale is not None}
    rows = [r for r in found.rows if r.method == OWN and r.chosen_by]
    assert {(r.variant, r.scale) for r in rows} == set(taken)
    for r in rows:
        own = r.scale == trained and r.variant != "probe"  # the run's evaluation has no such row
        assert r.row.name == (r.variant if own else f"{OWN}@{r.scale:g}_{r.variant}") and r.row.scale == r.scale
        assert own or r.notes
    assert sum(is_own(r) for r in found.rows) == 3  # pictures and sentences are of the run as it was trained
    monkeypatch.setattr(sweep, "generate", lambda *a, **k: pytest.fail("decoded again"))
    assert compare(run, means, judge=WordJudge(), table=[stand_in(scales=(1.0,))], variants=["oracle"]) == found
