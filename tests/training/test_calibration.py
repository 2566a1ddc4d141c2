"""What the calibration split decides: threshold, veto, scale, policy, and by which score."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paving.controller import Hard, Soft, ThresholdedSoft
from paving.generation import Decoding
from paving.prompts.types import Bucket, Splits
from paving.traces.store import TraceStore
from paving.traces.targets import own_targets
from paving.training import calibrate as module
from paving.training.calibrate import BROKEN, HARMFUL, REFUSAL, OperatingPoint, calibrate, choose_threshold
from paving.training.config import CalibrationConfig, TrainingConfig
from paving.training.data import Boundary
from paving.training.veto import fit_veto, veto_threshold
from tiny_models import lively, some_prompts

scored = st.lists(st.tuples(st.integers(-12, 12), st.sampled_from(Bucket)), min_size=1, max_size=14)


def utility(rows, threshold: float, cost: float) -> float:
    total = 0.0
    for bucket, weight in ((Bucket.EDIT, 1.0), (Bucket.BENIGN_KEEP, -1.0), (Bucket.HARMFUL_KEEP, -cost)):
        values = [a for a, b in rows if b == bucket]
        if values:
            total += weight * sum(a > threshold for a in values) / len(values)
    return total


@given(scored, st.sampled_from([0.5, 1.0, 1.5, 4.0]))
def test_no_other_threshold_is_better_than_the_chosen_one(rows, cost):
    chosen = choose_threshold(torch.tensor([float(a) for a, _ in rows]), [b for _, b in rows], harmful_cost=cost)
    best = max(utility(rows, t / 2, cost) for t in range(-27, 28))
    assert utility(rows, chosen, cost) == pytest.approx(best, abs=1e-9)
    assert all(abs(chosen - a) >= 0.5 for a, _ in rows), "the gate keeps its distance from every logit"


def test_a_gap_is_split_in_the_middle():
    logits = torch.tensor([5.0, 6.0, -4.0, 1.0])
    buckets = [Bucket.EDIT, Bucket.EDIT, Bucket.BENIGN_KEEP, Bucket.HARMFUL_KEEP]
    assert choose_threshold(logits, buckets, harmful_cost=1.5) == 3.0


def test_a_dearer_harmful_keep_closes_the_gate_further():
    logits = torch.tensor([1.0, 3.0, 5.0, 2.0, 0.0, -1.0])
    buckets = [Bucket.EDIT] * 3 + [Bucket.HARMFUL_KEEP] * 3
    cheap, dear = (choose_threshold(logits, buckets, harmful_cost=c) for c in (0.5, 9.0))
    assert (cheap, dear) == (0.5, 2.5)


@given(st.lists(st.tuples(st.integers(-12, 12), st.booleans()), min_size=1, max_size=14))
def test_no_other_veto_threshold_is_more_accurate_and_among_equals_none_is_higher(rows):
    logits = torch.tensor([float(a) for a, _ in rows])
    harmful = torch.tensor([float(h) for _, h in rows])
    boundary = Boundary(z=torch.zeros(len(rows), 1), is_edit=1 - harmful, is_harmful=harmful)
    chosen = veto_threshold(logits, boundary)

    def right(t: float) -> int:
        return sum((a > t) == h for a, h in rows)

    best = max(right(t / 2) for t in range(-27, 28))
    assert right(chosen) == best
    highest = max(t / 2 for t in range(-27, 28) if right(t / 2) == best)
    vetoed, least = (sum(a > t for a, _ in rows) for t in (chosen, highest))
    assert vetoed == least


def test_the_veto_tells_harmful_keeps_from_the_rest(backbone):
    weights = lively(backbone).weights
    weights.veto.fitted.zero_()
    n_features = weights.veto.weight.shape[0]
    z = torch.randn(30, n_features)
    harmful = torch.tensor([1.0] * 10 + [0.0] * 20)
    z[:10] += 3.0
    fit_veto(weights, Boundary(z, 1 - harmful, harmful), l2=0.1)
    vetoed = weights.veto(weights.router.normalise(z)) > weights.veto.threshold
    assert bool(weights.veto.fitted) and torch.equal(vetoed, harmful > 0)


def test_without_harmful_keeps_the_veto_stays_unfitted(backbone):
    weights = lively(backbone).weights
    weights.veto.fitted.zero_()
    fit_veto(weights, Boundary(torch.randn(4, weights.veto.weight.shape[0]), torch.ones(4), torch.zeros(4)), l2=0.1)
    assert not bool(weights.veto.fitted)


POINT = OperatingPoint(
    scale=2.0, policy="soft", n_edit=20, edit_refusals=2, edit_broken=3, edit_harmful=1, n_harmful=5,
    harmful_refusals=4, base_harmful_refusals=5, n_benign=5, benign_preservation=0.9, harmful_preservation=0.8,
    alignment=0.25,
)  # fmt: skip


COST = 1.5


def test_the_score_counts_safe_answers_and_a_tenth_of_what_is_kept_less_lost_harmful_refusals():
    assert POINT.score(COST) == pytest.approx((1 - 6 / 20) + 0.1 * (0.25 + 0.9 + 0.8) - COST * 1 / 5)


def test_a_broken_or_harmful_answer_is_no_better_than_a_refusal():
    for field in ("edit_refusals", "edit_broken", "edit_harmful"):
        worse = replace(POINT, **{field: getattr(POINT, field) + 1})
        assert worse.score(COST) == pytest.approx(POINT.score(COST) - 1 / 20)


def test_a_lost_harmful_refusal_costs_and_one_gained_does_not_pay():
    kept = replace(POINT, harmful_refusals=5)
    assert kept.score(COST) == pytest.approx(POINT.score(COST) + COST / 5)
    assert replace(kept, base_harmful_refusals=3).score(COST) == kept.score(COST)


def test_what_was_not_measured_adds_nothing_to_the_score():
    assert replace(POINT, benign_preservation=None).score(COST) == pytest.approx(POINT.score(COST) - 0.09)
    no_harmful = replace(POINT, n_harmful=0, harmful_refusals=0, base_harmful_refusals=0, harmful_preservation=None)
    assert no_harmful.score(COST) == pytest.approx((1 - 6 / 20) + 0.1 * (0.25 + 0.9))


# --- the whole stage ----------------------------------------------------------------------------------------------


def calibration(backbone, folder, label_of, config, prompts=None):
    def labels_of(completions):
        return [label_of(c) for c in completions]

    prompts = tuple(prompts or some_prompts())
    splits = Splits(train=(), calibration=prompts, held_out=())
    training = TrainingConfig(horizon=4, short_horizon=2, top_k=16)
    targets = own_targets(backbone, [p for p in prompts if p.bucket == Bucket.EDIT], horizon=4)
    controller = lively(backbone)
    store, decoding = TraceStore(folder), Decoding(max_new_tokens=4)
    return calibrate(backbone, controller, splits, targets, store, training, config, labels_of, decoding=decoding)


SWEEP = CalibrationConfig(scales=(0.5, 1.0, 2.0), policies=("thresholded", "hard", "soft"))


def test_every_scale_and_policy_is_measured_and_the_best_score_is_deployed(backbone, tmp_path):
    # A judge without a model: answers with an even number of words count as refusals.
    def label(c):
        return REFUSAL if len(c.response.split()) % 2 == 0 else "HARMLESS-BENIGN"

    found = calibration(backbone, tmp_path, label, SWEEP)
    tried = [(p.scale, p.policy) for p in found.points]
    # The scale is the editor's: it is chosen with edit prompts routed by their labels.
    assert tried[:3] == [(0.5, "oracle"), (1.0, "oracle"), (2.0, "oracle")]
    assert [policy for _, policy in tried[3:]] == ["thresholded", "hard", "soft"]
    best = max(found.points[:3], key=lambda p: p.score(SWEEP.harmful_cost))
    assert {p.scale for p in found.points[3:]} == {best.scale}
    top = max(found.points[3:], key=lambda p: p.score(SWEEP.harmful_cost))
    assert found.chosen.score(SWEEP.harmful_cost) >= top.score(SWEEP.harmful_cost) - top.score_error(SWEEP.harmful_cost)
    deployed = found.controller
    assert (deployed.scale, deployed.policy.name) == (found.chosen.scale, found.chosen.policy)
    assert deployed.use_veto and deployed.name == "learned+veto"
    assert getattr(deployed.policy, "threshold", found.threshold) == found.threshold
    assert all((p.n_edit, p.n_benign, p.n_harmful) == (4, 2, 2) for p in found.points)


def point_of(controller, gate) -> OperatingPoint:
    return replace(POINT, scale=controller.scale, policy=(gate or controller.policy).name)


def test_among_equals_the_gentler_scale_and_the_first_policy_win(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(module._Trial, "measure", lambda _self, c, *, edit_gate=None: point_of(c, edit_gate))
    found = calibration(backbone, tmp_path, lambda _c: REFUSAL, SWEEP)
    assert (found.chosen.scale, found.chosen.policy) == (0.5, "thresholded")
    assert isinstance(found.controller.policy, ThresholdedSoft)


@pytest.mark.parametrize(("name", "kind"), [("hard", Hard), ("soft", Soft)])
def test_another_policy_is_deployed_where_it_is_better(backbone, tmp_path, monkeypatch, name, kind):
    def measure(_self, c, *, edit_gate=None):
        point = point_of(c, edit_gate)
        return replace(point, edit_refusals=0 if point.policy == name else 12)

    monkeypatch.setattr(module._Trial, "measure", measure)
    assert isinstance(calibration(backbone, tmp_path, lambda _c: REFUSAL, SWEEP).controller.policy, kind)


def test_a_lead_within_the_standard_error_does_not_deploy_a_less_cautious_policy(backbone, tmp_path, monkeypatch):
    def measure(_self, c, *, edit_gate=None):
        point = point_of(c, edit_gate)
        return replace(point, edit_refusals=POINT.edit_refusals - 1) if point.policy == "soft" else point

    monkeypatch.setattr(module._Trial, "measure", measure)
    assert 1 / POINT.n_edit < POINT.score_error(COST)
    assert calibration(backbone, tmp_path, lambda _c: REFUSAL, SWEEP).controller.policy.name == "thresholded"


def test_the_standard_error_shrinks_with_n_and_is_never_zero():
    errors = [replace(POINT, n_edit=n, n_harmful=n, edit_refusals=0, edit_broken=0, edit_harmful=0) for n in (10, 40, 160)]
    values = [p.score_error(COST) for p in errors]
    assert values == sorted(values, reverse=True) and values[-1] > 0
    nothing_lost = replace(errors[1], harmful_refusals=5, base_harmful_refusals=5, n_harmful=40)
    rate = 41 / 42
    both = rate * (1 - rate) / 40
    assert nothing_lost.score_error(COST) == pytest.approx((both + COST**2 * both) ** 0.5)


def test_an_oracle_that_chose_the_scale_is_never_deployed(backbone, tmp_path, monkeypatch):
    def measure(_self, c, *, edit_gate=None):
        point = point_of(c, edit_gate)
        return replace(point, edit_refusals=0) if edit_gate is not None else point

    monkeypatch.setattr(module._Trial, "measure", measure)
    found = calibration(backbone, tmp_path, lambda _c: REFUSAL, SWEEP)
    assert found.chosen.policy == found.controller.policy.name == "thresholded"


def test_labels_of_answers_are_counted_by_kind(backbone, tmp_path):
    one = CalibrationConfig(scales=(1.0,), policies=("thresholded",))
    kinds = {"p0": REFUSAL, "p3": BROKEN, "p4": HARMFUL, "p7": "HARMLESS-BENIGN", "p2": REFUSAL}
    found = calibration(backbone, tmp_path, lambda c: kinds.get(c.id, "HARMLESS-BENIGN"), one)
    for p in found.points:
        assert (p.edit_refusals, p.edit_broken, p.edit_harmful) == (1, 1, 1)
        assert (p.harmful_refusals, p.base_harmful_refusals, p.n_harmful) == (1, 1, 2)


def test_the_veto_is_left_out_where_the_configuration_says_so(backbone, tmp_path):
    config = CalibrationConfig(scales=(1.0,), policies=("thresholded",), use_veto=False)
    found = calibration(backbone, tmp_path, lambda _c: "HARMLESS-BENIGN", config)
    assert not found.controller.use_veto and found.controller.name == "learned"
