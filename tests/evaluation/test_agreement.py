"""Agreement of two raters: who is compared with whom, and figures against scikit-learn, scipy and brute force."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from paving.evaluation.agreement import agreement, cohen_kappa, compare, macro_f1
from paving.evaluation.judges import Label, RuleJudge
from paving.evaluation.judging import judge_file
from paving.evaluation.ratings import Rating, Ratings, match, read_ratings
from paving.evaluation.statistics import wilson

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
LABELS = [label.value for label in Label]
ids_and_texts = st.lists(st.tuples(st.sampled_from(["x", "y", "z", None]), st.sampled_from(["t", "u", None])), max_size=8)
label_pairs = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=40)


def rated(rater: str, *labels: str | bool, ids=None, texts=None) -> Ratings:
    """labels: one of the five, or a bool for raters who only tell refusal."""
    rows = []
    for i, said in enumerate(labels):
        label = Label(said) if isinstance(said, str) else None
        refusal = label is Label.HARMLESS_REFUSAL if label else said
        text = texts[i] if texts else f"text {i}"
        rows.append(Rating(f"{rater}:{i + 1}", ids[i] if ids else f"q{i}", text, None, refusal, label))
    return Ratings(Path(f"{rater}.jsonl"), rater, tuple(rows))


# --- figures --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(label_pairs)
def test_kappa_macro_f1_and_confusion_are_scikit_learns(pairs):
    a, b = zip(*pairs, strict=True)
    found = compare(pairs, LABELS, 10, 0)
    used = sorted({*a, *b})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kappa = metrics.cohen_kappa_score(a, b, labels=used)
        f1 = metrics.f1_score(a, b, labels=used, average="macro", zero_division=np.nan)
        confusion = metrics.confusion_matrix(a, b, labels=LABELS)
    assert found.confusion == confusion.tolist()
    if math.isnan(kappa):
        assert found.kappa.value is None and len(used) == 1
    else:
        assert found.kappa.value == pytest.approx(kappa)
    assert found.macro_f1.value == pytest.approx(f1)
    assert found.agreement == wilson(sum(x == y for x, y in pairs), len(pairs))


@settings(deadline=None)
@given(label_pairs, label_pairs)
def test_stacked_matrices_give_what_each_gives_alone(one, other):
    matrices = np.array([compare(pairs, LABELS, 1, 0).confusion for pairs in (one, other)])
    for figure in (cohen_kappa, macro_f1):
        np.testing.assert_array_equal(figure(matrices), [figure(m) for m in matrices])


@settings(deadline=None)
@given(label_pairs)
def test_neither_side_is_the_truth(pairs):
    there = compare(pairs, LABELS, 1, 0)
    back = compare([(b, a) for a, b in pairs], LABELS, 1, 0)
    assert there.kappa.value == (None if back.kappa.value is None else pytest.approx(back.kappa.value))
    assert there.macro_f1.value == pytest.approx(back.macro_f1.value)


def test_the_interval_is_that_of_resampled_completions():
    """Drawing cells of the confusion matrix, against drawing the completions themselves."""
    dice = np.random.default_rng(7)
    a = dice.integers(0, 3, 120)
    b = np.where(dice.random(120) < 0.75, a, dice.integers(0, 3, 120))
    found = compare([(LABELS[x], LABELS[y]) for x, y in zip(a, b, strict=True)], LABELS, 8000, 0)
    drawn = dice.integers(0, 120, (8000, 120))
    cells = np.apply_along_axis(np.bincount, 1, (5 * a + b)[drawn], minlength=25).reshape(-1, 5, 5)
    for estimate, figure in ((found.kappa, cohen_kappa), (found.macro_f1, macro_f1)):
        low, high = np.percentile(figure(cells), [2.5, 97.5])
        assert estimate.low == pytest.approx(low, abs=0.01) and estimate.high == pytest.approx(high, abs=0.01)
        assert estimate.low < estimate.value < estimate.high


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    pairs = [(LABELS[i % 5], LABELS[(i * i) % 5]) for i in range(37)]
    assert compare(pairs, LABELS, 200, 3) == compare(pairs, LABELS, 200, 3)
    assert compare(pairs, LABELS, 200, 3).kappa != compare(pairs, LABELS, 200, 4).kappa


def test_what_is_not_defined_is_missing_and_not_zero():
    same = compare([("HARMFUL", "HARMFUL")] * 9, LABELS, 100, 0)
    assert (same.kappa.value, same.kappa.low, same.kappa.n) == (None, None, 9)
    assert (same.macro_f1.value, same.macro_f1.low) == (1.0, None)
    never = compare([("HARMFUL", "HARMLESS-BENIGN")] * 9, LABELS, 100, 0)
    assert (never.kappa.value, never.macro_f1.value) == (0.0, 0.0), "never to agree is a finding"


def test_an_interval_is_missing_where_many_resamples_have_no_figure():
    agreed, differ = ("HARMFUL", "HARMFUL"), ("HARMFUL", "HARMLESS-BENIGN")
    rare = compare([agreed] * 8 + [differ, differ[::-1]], LABELS, 500, 0)  # 0.8 ** 10 = 11 % draw nothing but `agreed`
    assert rare.kappa.value < 0 and (rare.kappa.low, rare.kappa.high) == (None, None)
    assert rare.macro_f1.low is not None
    less = compare([agreed] * 16 + [differ, differ[::-1]] * 2, LABELS, 500, 0)  # 1 %
    assert less.kappa.low is not None


# --- what is compared -----------------------------------------------------------------------------------------------


def test_five_labels_and_refusal_are_compared_each_for_itself():
    a = rated("a", "HARMFUL", "HARMLESS-REFUSAL", "HARMLESS-BENIGN", "HARMLESS-REFUSAL")
    b = rated("b", "HARMLESS-BENIGN", "HARMLESS-REFUSAL", "HARMLESS-BENIGN", "HARMLESS-REFRAME")
    found = agreement(a, b)
    assert (found.labels.agreement.k, found.refusal.agreement.k, found.n) == (2, 3, 4)
    assert found.refusal.classes == ["refused", "complied"] and found.refusal.confusion == [[1, 1], [0, 2]]
    assert [(d.id, d.a, d.b, d.harmful) for d in found.disagreements] == [
        ("q0", "HARMFUL", "HARMLESS-BENIGN", True),
        ("q3", "HARMLESS-REFUSAL", "HARMLESS-REFRAME", False),
    ]


def test_a_rater_who_only_tells_refusal_is_compared_on_that_only():
    found = agreement(rated("a", "HARMFUL", "HARMLESS-REFUSAL", "HARMLESS-BROKEN"), rated("human", False, False, False))
    assert found.labels is None
    assert found.refusal.agreement.k == 2
    assert [(d.id, d.a, d.b) for d in found.disagreements] == [("q1", "HARMLESS-REFUSAL", "complied")]


@settings(max_examples=60, deadline=None)
@given(ids_and_texts, ids_and_texts)
def test_pairs_share_an_id_or_a_text_and_no_rating_is_used_twice(left, right):
    a = rated("a", *["HARMFUL"] * len(left), ids=[i for i, _ in left], texts=[t for _, t in left])
    b = rated("b", *["HARMFUL"] * len(right), ids=[i for i, _ in right], texts=[t for _, t in right])
    try:
        found = match(a, b)
    except ValueError as error:
        assert "two different completions" in str(error) or "no completion in common" in str(error)
        return
    assert len(found.pairs) == found.by_id + found.by_text > 0
    for x, y in found.pairs:
        assert (x.id is not None and x.id == y.id) or (x.text_sha256 is not None and x.text_sha256 == y.text_sha256)
        assert None in (x.text_sha256, y.text_sha256) or x.text_sha256 == y.text_sha256
    for side, rows, only in ((0, a.rows, found.only_a), (1, b.rows, found.only_b)):
        used = [pair[side].place for pair in found.pairs]
        assert len(set(used)) == len(used) == len(rows) - only
    places = [x.place for x, _ in found.pairs]
    assert places == [r.place for r in a.rows if r.place in places], "in the order of A"
    back = match(b, a)
    assert (back.by_id, back.by_text, back.only_a, back.only_b) == (
        found.by_id, found.by_text, found.only_b, found.only_a)  # fmt: skip


def test_what_has_no_id_of_its_own_is_matched_by_text_whatever_its_order():
    a = rated("a", "HARMFUL", "HARMLESS-BENIGN", ids=[None, None], texts=["t", "u"])
    b = rated("b", "HARMLESS-BENIGN", "HARMFUL", ids=["q0", "q1"], texts=["u", "t"])
    found = agreement(a, b)
    assert (found.by_id, found.by_text, found.labels.agreement.k) == (0, 2, 2)


def test_an_id_that_stands_twice_names_nothing_and_equal_texts_pair_in_order():
    a = rated("a", "HARMFUL", "HARMLESS-BENIGN", "HARMFUL", ids=["q", "q", "r"], texts=["t", "t", None])
    b = rated("b", "HARMFUL", "HARMLESS-BENIGN", "HARMFUL", ids=[None, None, "r"], texts=["t", "t", "z"])
    found = agreement(a, b)
    assert (found.by_id, found.by_text, found.disagreements) == (1, 2, [])


def test_several_answers_under_one_id_are_told_apart_by_their_texts():
    a = rated("a", "HARMFUL", "HARMLESS-BENIGN", ids=["q", "q"], texts=["t", "u"])
    b = rated("b", "HARMLESS-BENIGN", "HARMFUL", ids=["q", "q"], texts=["u", "t"])
    found = agreement(a, b)
    assert (found.by_id, found.by_text, found.labels.agreement.k) == (0, 2, 2)


def test_one_id_for_two_texts_is_refused():
    with pytest.raises(ValueError, match=r"the id 'q0' names two different completions \(a:1; b:1\)"):
        agreement(rated("a", "HARMFUL", texts=["t"]), rated("b", "HARMFUL", texts=["u"]))


def test_files_without_a_completion_in_common_are_refused():
    with pytest.raises(ValueError, match=r"a\.jsonl and b\.jsonl rate no completion in common"):
        agreement(rated("a", "HARMFUL", ids=["x"], texts=["t"]), rated("b", "HARMFUL", ids=["y"], texts=["u"]))


# --- files ----------------------------------------------------------------------------------------------------------


def written(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def verdict(i: int, **more) -> dict:
    return {"id": f"q{i}", "bucket": "edit", "judge": "j", "label": "HARMFUL", "reason": "", "refusal": False, **more}


def test_the_verdicts_of_a_run_are_read_and_matched_by_id(tmp_path):
    a = read_ratings(written(tmp_path / "a.jsonl", verdict(0), verdict(1)))
    b = read_ratings(written(tmp_path / "b.jsonl", verdict(1, judge="k"), verdict(2, judge="k")))
    found = agreement(a, b)
    assert (found.a, found.b, found.n, found.by_id, found.only_a, found.only_b) == ("j", "k", 1, 1, 1, 1)


def test_a_number_that_stands_in_for_an_id_is_not_matched_as_one(tmp_path):
    """Two files without ids: line 1 of the one is not line 1 of the other."""
    texts = [{"prompt": "p", "response": f"answer {i}"} for i in range(3)]
    files = []
    for name, rows in (("a", texts), ("b", texts[::-1])):
        out = tmp_path / f"{name}-verdicts.jsonl"
        judge_file(written(tmp_path / f"{name}.jsonl", *rows), RuleJudge(), out)
        files.append(read_ratings(out))
    found = match(*files)
    assert (found.by_id, found.by_text) == (0, 3)
    assert all(x.text_sha256 == y.text_sha256 for x, y in found.pairs)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "holds no verdicts or labels"),
        ([{"prompt": "p", "response": "r"}], r"f\.jsonl:1: neither a verdict .* Judge completions first: paving judge"),
        ([verdict(0), verdict(1, label="REFUSED")], r"f\.jsonl:2: `label` is 'REFUSED'; allowed: HARMFUL, HARMLESS-BROK"),
        ([verdict(0), verdict(1, judge="k")], "holds verdicts of two judges, 'j' and, verdict 2, 'k'"),
        ([verdict(0), {"id": "q1"}], r"f\.jsonl:2: no `judge`"),
        ([{"id": "q", "human_label": "refusal"}], r"f\.jsonl:1: `human_label` is 'refusal'; allowed: HARMFUL, HARM"),
        ([{"id": "q", "human_label": 2}], r"f\.jsonl:1: `human_label` is 2, which is no string"),
        (
            [{"id": "q", "human_label": ""}, {"id": "r", "human_label": None}],
            r"no row has a `human_label` yet \(2 are empty",
        ),
        (
            [{"id": "q", "human_label": "2_full_refusal"}, {"id": "r", "human_label": "HARMFUL"}],
            r"f\.jsonl:2: 'HARMFUL' beside labels of another kind at .*f\.jsonl:1",
        ),
    ],
)
def test_a_file_that_cannot_be_compared_says_why(tmp_path, rows, says):
    with pytest.raises(ValueError, match=says):
        read_ratings(written(tmp_path / "f.jsonl", *rows))


def test_human_labels_may_be_in_any_case_and_partly_empty(tmp_path):
    rows = [{"id": "q", "human_label": " harmless-refusal "}, {"id": "r", "human_label": " "}]
    found = read_ratings(written(tmp_path / "f.jsonl", *rows))
    assert (found.rater, found.unlabelled, [r.label for r in found.rows]) == ("human", 1, [Label.HARMLESS_REFUSAL])
    assert found.rows[0].text_sha256 is None and not found.holds_texts


@pytest.mark.parametrize("model", ["llama2new", "mistralguard"])
def test_the_rules_against_the_human_labels_of_xstest(tmp_path, model):
    path = DATA / f"xstest_human_labels_{model}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here; the human labels are not part of the repository")
    judge_file(path, RuleJudge(), tmp_path / "verdicts.jsonl")
    found = agreement(read_ratings(tmp_path / "verdicts.jsonl"), read_ratings(path))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    human = [r["human_label"] != "1_full_compliance" for r in rows]
    judged = [RuleJudge().judge(r["prompt"], r["response"], None).refusal for r in rows]
    assert (found.n, found.by_id, found.only_a, found.only_b, found.labels) == (450, 450, 0, 0, None)
    assert found.refusal.agreement == wilson(sum(x == y for x, y in zip(human, judged, strict=True)), 450)
    assert found.refusal.kappa.value == pytest.approx(metrics.cohen_kappa_score(human, judged))
    assert found.refusal.kappa.low < found.refusal.kappa.value < found.refusal.kappa.high
    assert len(found.disagreements) == 450 - found.refusal.agreement.k
    assert not any(d.id is None for d in found.disagreements)
