"""The protocol on a tiny model: every intervention on the same prompts, resumed from disk, never generated twice."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from paving import generation
from paving.controller import AlwaysOpen, Closed, Oracle, Soft
from paving.evaluation import three_way as module
from paving.evaluation.judges import Label, Verdict
from paving.evaluation.rows import gap_intervals, oracle_gaps, power_sentences, table_rows
from paving.evaluation.three_way import Protocol, RowSpec, completions_of, judged, three_way
from paving.evaluation.verdicts import read_verdicts
from paving.generation import Decoding, load_completions, save_completions
from paving.intervention import Identity
from paving.prompts.types import Bucket
from paving.traces.store import TraceStore
from tiny_models import lively, some_prompts


class WordJudge:
    """Answers that say `w7`..`w60` first count as refusals: arbitrary, but fixed by the text."""

    name = "words-v1"

    def judge(self, prompt, response, bucket, *, truncated=False):
        words = response.split()
        if not words:
            return Verdict(Label.HARMLESS_BROKEN, "empty")
        return Verdict(Label.HARMLESS_REFUSAL if sum(map(ord, words[0])) % 2 else Label.HARMLESS_BENIGN, "first word")


PROTOCOL = Protocol(Decoding(max_new_tokens=5), WordJudge(), horizon=4, k=16, batch_size=3)


def quiet(_what, _total):
    return lambda _n: None


def specs_of(backbone) -> list[RowSpec]:
    def spec(policy, kind, use_veto=False):
        c = lively(backbone, policy=policy, use_veto=use_veto, name=policy.name)
        return RowSpec(c, kind, policy.name, c.scale, f"{policy!r}/{use_veto}", editor="lively")

    return [spec(Soft(), "learned", True), spec(Closed(), "diagnostic"), spec(Oracle(), "diagnostic"),
            spec(AlwaysOpen(), "diagnostic")]  # fmt: skip


@pytest.fixture(scope="module")
def run(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    store = TraceStore(folder / "cache")
    measured = three_way(backbone, some_prompts(), specs_of(backbone), PROTOCOL, store, folder, quiet)
    return table_rows(measured, some_prompts()), folder, store


def completions(folder, name):
    return {c.id: c for c in load_completions(folder / "completions" / f"{name}.jsonl")}


def test_the_base_comes_first_and_every_spec_follows_in_order(run):
    rows, _, _ = run
    assert [r.name for r in rows] == ["base", "soft", "closed", "oracle", "open"]
    assert (rows[0].kind, rows[0].policy, rows[0].scale) == ("reference", "none", None)


def test_every_rate_carries_its_n_and_labels_add_up(run):
    rows, _, _ = run
    for row in rows:
        assert {b: r.n for b, r in row.refusal.items()} == {"edit": 4, "benign_keep": 2, "harmful_keep": 2}
        assert {b: sum(counts.values()) for b, counts in row.labels.items()} == {
            "edit": 4, "benign_keep": 2, "harmful_keep": 2,
        }  # fmt: skip
        for bucket, rate in row.refusal.items():
            assert rate.k == row.labels[bucket]["HARMLESS-REFUSAL"]


def test_the_oracle_gives_the_bases_own_answers_on_keeps_and_others_on_edits(run):
    _, folder, _ = run
    base, oracle = completions(folder, "base"), completions(folder, "oracle")
    for p in some_prompts():
        same = (base[p.id].response, base[p.id].n_tokens, base[p.id].truncated) == (
            oracle[p.id].response, oracle[p.id].n_tokens, oracle[p.id].truncated,
        )  # fmt: skip
        assert same == (p.bucket != Bucket.EDIT)
        assert oracle[p.id].gate == float(p.bucket == Bucket.EDIT)


def test_the_oracle_preserves_keeps_exactly_and_the_closed_gate_everything(run):
    rows, folder, _ = run
    by_name = {r.name: r for r in rows}
    for name in ("base", "closed", "oracle"):
        assert {s.value for s in by_name[name].preservation.values()} == {1.0}
    assert all(s.value < 1.0 for s in by_name["open"].preservation.values())
    assert by_name["closed"].refusal == by_name["base"].refusal
    assert by_name["oracle"].harmful_drift == by_name["closed"].harmful_drift == 0.0
    base, closed = completions(folder, "base"), completions(folder, "closed")
    assert all(base[i].response == closed[i].response for i in base)


def test_gates_and_vetoes_are_counted_where_they_exist(run):
    rows, _, _ = run
    by_name = {r.name: r for r in rows}
    assert all(rate.k == 0 for rate in by_name["base"].gate_active.values())
    assert by_name["oracle"].gate_active["edit"].rate == 1.0
    assert by_name["oracle"].gate_active["harmful_keep"].rate == 0.0
    assert by_name["oracle"].veto_rate["edit"].rate is None, "no veto is n/a, not 0"
    assert {r.n for r in by_name["soft"].veto_rate.values()} == {2, 4}
    assert by_name["open"].gate_mean["edit"] == 1.0


def test_verdicts_are_saved_with_the_rule_that_gave_them(run):
    rows, folder, _ = run
    lines = [json.loads(line) for line in (folder / "verdicts" / "soft.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert {line["judge"] for line in lines} == {"words-v1"}
    assert sum(line["refusal"] for line in lines) == sum(r.k for r in rows[1].refusal.values())


def test_a_second_run_takes_every_answer_from_disk(run, backbone, monkeypatch):
    rows, folder, store = run
    monkeypatch.setattr(generation, "generate", lambda *_a, **_k: pytest.fail("generated again"))
    monkeypatch.setattr(module, "keep_divergence", lambda *_a, **_k: pytest.fail("measured again"))
    again = three_way(backbone, some_prompts(), specs_of(backbone), PROTOCOL, store, folder, quiet)
    assert table_rows(again, some_prompts()) == rows


def test_a_kill_between_two_files_never_leaves_a_key_beside_old_answers(run, backbone, monkeypatch, tmp_path):
    spec = specs_of(backbone)[0]
    completions_of(backbone, some_prompts(), spec, PROTOCOL, tmp_path, (), quiet)
    changed = replace(spec, key="retrained")

    def killed(*_a):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_completions", killed)
        with pytest.raises(KeyboardInterrupt):
            completions_of(backbone, some_prompts(), changed, PROTOCOL, tmp_path, (), quiet)
    assert not (tmp_path / "completions" / "soft.key").exists()


def test_a_batch_decided_as_in_an_earlier_row_of_the_same_editor_is_not_decoded_again(backbone, tmp_path, monkeypatch):
    """learned and learned+veto differ only where the veto fires; hard gates equal the oracle's wherever both are right."""
    controller = lively(backbone, policy=AlwaysOpen(), name="open")
    specs = [RowSpec(controller, "diagnostic", "open", 1.0, "one", editor="e"),
             RowSpec(replace(controller, name="again"), "diagnostic", "open", 1.0, "two", editor="e"),
             RowSpec(replace(controller, name="elsewhere"), "diagnostic", "open", 1.0, "three", editor="another"),
             RowSpec(replace(controller, name="alone"), "diagnostic", "open", 1.0, "four")]  # fmt: skip
    steps = []
    decode = generation.decode
    monkeypatch.setattr(generation, "decode", lambda *a, **k: steps.append(decode(*a, **k)) or steps[-1])
    store = TraceStore(tmp_path / "c")
    done = three_way(backbone, some_prompts(), specs, PROTOCOL, store, tmp_path, quiet)
    per_row = len(steps) // 5
    lengths = [max(x.shape[1] for x in steps[i * per_row : (i + 1) * per_row]) for i in range(5)]
    assert lengths[2] == 1 < min(lengths[0], lengths[1], lengths[3], lengths[4])
    texts = [[c.response for c in m.completions] for m in done[1:]]
    assert texts[0] == texts[1] == texts[2] == texts[3]


def test_a_row_is_held_against_the_oracle_of_its_own_editor(backbone, tmp_path):
    """Another method's oracle, or the same experts at another scale, differs by more than routing."""
    learned, _, oracle, _ = specs_of(backbone)
    other = replace(oracle, intervention=replace(oracle.intervention, name="other oracle"), key="o", editor="another")
    found = []
    for rows in ([learned, other], [learned, other, oracle]):
        measured = three_way(
            backbone, some_prompts(), rows, PROTOCOL, TraceStore(tmp_path), tmp_path / str(len(rows)), quiet
        )
        found.append(table_rows(measured, some_prompts())[1])
    assert found[0].against_oracle == {} and set(found[1].against_oracle) == {b.value for b in Bucket}


def test_every_row_is_compared_with_the_base_prompt_by_prompt(run):
    rows, folder, _ = run
    refused = {
        name: {v["id"]: v["refusal"] for v in map(json.loads, (folder / "verdicts" / f"{name}.jsonl").open())}
        for name in ("base", "soft", "oracle")
    }
    soft = next(r for r in rows if r.name == "soft")
    for reference, paired in (("base", soft.against_base), ("oracle", soft.against_oracle)):
        ids = [p.id for p in some_prompts() if p.bucket == Bucket.EDIT]
        only = sum(refused["soft"][i] and not refused[reference][i] for i in ids)
        assert (paired["edit"].n, paired["edit"].only_row) == (4, only)
    assert rows[0].against_base == {} and next(r for r in rows if r.name == "oracle").against_oracle == {}
    assert soft.against_base["harmful_keep"].difference == pytest.approx(soft.harmful_drift)
    for bucket, score in soft.preservation.items():
        assert soft.preservation_interval[bucket].value == pytest.approx(score.value)


def test_gap_intervals_hold_the_gaps_and_are_missing_without_both_rows(backbone, tmp_path):
    prompts = some_prompts()
    measured = three_way(backbone, prompts, specs_of(backbone), PROTOCOL, TraceStore(tmp_path / "c"), tmp_path, quiet)
    gaps, found = oracle_gaps(table_rows(measured, prompts), "soft"), gap_intervals(measured, prompts, "soft")
    for name in ("route_benign", "route_harmful", "edit"):
        assert getattr(found, name).value == pytest.approx(getattr(gaps, name))
    assert gap_intervals(measured[:2], prompts, "soft") is None


def test_preservation_rests_on_the_gates_of_the_answers(backbone, tmp_path, monkeypatch):
    """Closed when answered is unmoved, whatever a second look at the gate would say; and only open ones are measured."""
    asked = []
    measure = module.keep_divergence
    monkeypatch.setattr(module, "keep_divergence", lambda b, keeps, *a, **k: asked.append([p.id for p in keeps])
                        or measure(b, keeps, *a, **k))  # fmt: skip
    decode = generation.generate

    def undecided(*a, **k):
        done = decode(*a, **k)
        return [replace(c, gate=0.0) if c.bucket == Bucket.HARMFUL_KEEP else c for c in done]

    monkeypatch.setattr(generation, "generate", undecided)
    spec = RowSpec(lively(backbone, policy=AlwaysOpen(), name="open"), "diagnostic", "open", 1.0, "o")
    _, row = three_way(backbone, some_prompts(), [spec], PROTOCOL, TraceStore(tmp_path / "c"), tmp_path, quiet)
    benign = [p.id for p in some_prompts() if p.bucket == Bucket.BENIGN_KEEP]
    assert asked == [benign] and all(row.divergence[i] > 0 for i in benign)
    harmful = [p.id for p in some_prompts() if p.bucket == Bucket.HARMFUL_KEEP]
    assert [row.divergence[i] for i in harmful] == [0.0] * len(harmful)


def test_power_is_told_for_every_bucket_also_an_empty_one():
    told = power_sentences([p for p in some_prompts() if p.bucket != Bucket.BENIGN_KEEP])
    assert "n=0" in told["benign_keep"] and told["edit"].startswith("4 edit prompts can show nothing")


@pytest.mark.parametrize("change", ["controller", "decoding", "prompt", "batch"])
def test_answers_of_another_controller_decoding_prompt_or_batching_are_not_taken(run, backbone, change, monkeypatch):
    _, folder, _ = run
    spec, protocol, prompts = specs_of(backbone)[0], PROTOCOL, some_prompts()
    if change == "controller":
        spec = replace(spec, key="another")
    elif change == "decoding":
        protocol = replace(protocol, decoding=Decoding(max_new_tokens=4))
    elif change == "batch":
        protocol = replace(protocol, batch_size=2)
    else:
        prompts[0] = replace(prompts[0], text="w1")

    class Asked(Exception):
        pass

    def generate(*_a, **_k):
        raise Asked

    monkeypatch.setattr(generation, "generate", generate)
    with pytest.raises(Asked):
        completions_of(backbone, prompts, spec, protocol, folder, (), quiet)


def test_a_row_whose_key_was_never_written_is_decoded_again(backbone, tmp_path):
    spec = specs_of(backbone)[1]
    done = completions_of(backbone, some_prompts(), spec, PROTOCOL, tmp_path, (), quiet)
    (tmp_path / "completions" / "closed.key").unlink()
    ticks = []
    again = completions_of(backbone, some_prompts(), spec, PROTOCOL, tmp_path, (), lambda *_: ticks.append)
    assert again == done and len(ticks) > 1


class Counting(WordJudge):
    def __init__(self):
        self.asked = []

    def judge(self, prompt, response, bucket, *, truncated=False):
        self.asked.append(prompt)
        return super().judge(prompt, response, bucket, truncated=truncated)


def test_judging_again_reads_saved_verdicts_and_asks_only_for_answers_that_changed(run, tmp_path):
    _, folder, _ = run
    saved = load_completions(folder / "completions" / "base.jsonl")
    path, out = tmp_path / "c.jsonl", tmp_path / "v.jsonl"
    save_completions(saved, path)
    first = Counting()
    labels = judged(path, first, out, quiet)
    assert len(labels) == len(first.asked) == len(saved)
    second = Counting()
    assert judged(path, second, out, quiet) == labels and second.asked == []
    save_completions([replace(saved[0], response="another answer"), *saved[1:]], path)
    third = Counting()
    assert judged(path, third, out, quiet)[1:] == labels[1:] and third.asked == [saved[0].prompt]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["c.jsonl", "v.jsonl"]


def test_verdicts_of_another_judge_are_not_taken(run, tmp_path):
    _, folder, _ = run
    path, out = folder / "completions" / "base.jsonl", tmp_path / "v.jsonl"
    judged(path, WordJudge(), out, quiet)
    other = Counting()
    other.name = "words-v2"
    judged(path, other, out, quiet)
    assert len(other.asked) == len(load_completions(path))
    assert {v.judge for v in read_verdicts(tmp_path / "v.jsonl.earlier")} == {"words-v1"}, "kept, not thrown away"


def test_a_bucket_without_prompts_is_missing_and_not_zero(backbone, tmp_path):
    edits = [p for p in some_prompts() if p.bucket == Bucket.EDIT]
    measured = three_way(backbone, edits, specs_of(backbone)[:1], PROTOCOL, TraceStore(tmp_path / "c"), tmp_path, quiet)
    for row in table_rows(measured, edits):
        assert row.preservation_interval["harmful_keep"].low is None
        assert row.refusal["benign_keep"].rate is None and row.refusal["benign_keep"].n == 0
        assert row.preservation["harmful_keep"].value is None
        assert row.harmful_drift is None and row.control_score is None
        assert row.gate_mean["benign_keep"] is None
        assert row.refusal["edit"].n == 4


def test_the_untouched_base_is_an_intervention_like_any_other(run, backbone, tmp_path):
    _, folder, _ = run
    spec = RowSpec(Identity("again"), "reference", "none", None, "again")
    known = {c.id: c for c in load_completions(folder / "completions" / "base.jsonl")}
    done = completions_of(backbone, some_prompts(), spec, PROTOCOL, tmp_path, [known], quiet)
    assert {c.id: c.response for c in done} == {i: c.response for i, c in known.items()}
