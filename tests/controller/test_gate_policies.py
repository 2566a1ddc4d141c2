"""Eq. 3: how a gate follows from the router's logit, what the veto may close, how experts are mixed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paving.backbone import PromptBatch
from paving.controller import (
    AlwaysOpen,
    Closed,
    Hard,
    Oracle,
    RouterMixture,
    SingleExpert,
    Soft,
    ThresholdedSoft,
    Uniform,
    WithoutExpert,
)
from paving.controller.gates import POLICY_NAMES, gate_policy, mixture_policy
from paving.controller.residual_paving import boundary_features
from paving.prompts.types import Bucket
from tiny_models import ROUTED, batch_of, lively, some_prompts, tiny_backbone

logits = st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=12)
thresholds = st.floats(-20, 20, width=32)


def labelled(n: int, buckets: list[Bucket | None] | None = None) -> PromptBatch:
    ids = torch.ones((n, 2), dtype=torch.long)
    return PromptBatch(ids, ids, tuple(str(i) for i in range(n)), tuple(buckets or [None] * n))


def sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-a))


@given(logits, thresholds)
def test_every_policy_is_equation_3(values, threshold):
    a, batch = torch.tensor(values), labelled(len(values))
    expected = {
        "soft": [sigmoid(x) for x in values],
        "hard": [1.0 if x > threshold else 0.0 for x in values],
        "thresholded": [sigmoid(x) if x > threshold else 0.0 for x in values],
        "closed": [0.0] * len(values),
        "open": [1.0] * len(values),
    }
    for name, gates in expected.items():
        gate = gate_policy(name, threshold).gate(a, batch)
        assert gate.dtype == torch.float32 and gate.shape == a.shape
        assert gate.tolist() == pytest.approx(gates, abs=1e-6)
        # Exactly closed, not nearly: a gate of 1e-30 would still be an edit.
        assert [g == 0.0 for g in gate.tolist()] == [g == 0.0 for g in gates]


@given(logits, thresholds)
def test_the_thresholded_gate_never_opens_wider_than_soft_or_hard(values, threshold):
    a, batch = torch.tensor(values), labelled(len(values))
    graded = ThresholdedSoft(threshold).gate(a, batch)
    assert bool((graded <= Soft().gate(a, batch)).all())
    assert bool((graded <= Hard(threshold).gate(a, batch)).all())


@given(st.lists(st.sampled_from(Bucket), min_size=1, max_size=8))
def test_the_oracle_opens_exactly_on_edit_prompts(buckets):
    gate = Oracle().gate(torch.zeros(len(buckets)), labelled(len(buckets), buckets))
    assert gate.tolist() == [1.0 if b is Bucket.EDIT else 0.0 for b in buckets]


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_every_policy_has_the_name_it_is_asked_for_by(name):
    assert gate_policy(name, 0.5).name == name


def test_an_unknown_policy_or_mixture_is_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match="'often' is not known; allowed: soft, hard, thresholded, closed, open, oracle"):
        gate_policy("often", 0.0)
    for name in ("best", "expert:", "expert:x", "expert:-1", "without:"):
        with pytest.raises(ValueError, match="allowed: router, uniform, expert:N, without:N"):
            mixture_policy(name)


@pytest.mark.parametrize("policy", [Soft(), Hard(-9.0), ThresholdedSoft(-9.0)], ids=lambda p: p.name)
def test_the_veto_closes_gates_that_it_may_close(backbone, batch, policy):
    controller = lively(backbone, policy=policy, use_veto=True)
    z = boundary_features(backbone, batch, controller.config)
    decision = controller.decide(z, batch)
    without = replace(controller, use_veto=False).decide(z, batch)
    assert decision.vetoed is not None and 0 < int(decision.vetoed.sum()) < len(batch)
    assert bool((decision.gate[decision.vetoed] == 0).all())
    assert torch.equal(decision.gate[~decision.vetoed], without.gate[~decision.vetoed])
    assert without.vetoed is None
    veto = controller.weights.veto
    by_hand = [(row @ veto.weight).item() > 0.0 for row in z]
    assert decision.vetoed.tolist() == by_hand


@pytest.mark.parametrize("policy", [Oracle(), AlwaysOpen(), Closed()], ids=lambda p: p.name)
def test_the_veto_leaves_diagnostic_gates_alone(backbone, batch, policy):
    controller = lively(backbone, policy=policy, use_veto=True)
    decision = controller.decide(boundary_features(backbone, batch, controller.config), batch)
    assert decision.vetoed is None
    assert torch.equal(decision.gate, policy.gate(decision.logit, batch))


def test_an_unfitted_veto_vetoes_nothing(backbone, batch):
    controller = lively(backbone, policy=AlwaysOpen())
    controller = replace(controller, policy=Hard(-1e9), use_veto=True)
    for tensor in (controller.weights.veto.weight, controller.weights.veto.fitted):
        tensor.zero_()
    z = boundary_features(backbone, batch, controller.config)
    assert controller.decide(z, batch).gate.tolist() == [1.0] * len(batch)


mixtures = st.lists(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), min_size=1, max_size=5)


@given(mixtures)
def test_every_mixture_sums_to_one(rows):
    weights = torch.tensor(rows) / torch.tensor(rows).sum(1, keepdim=True)
    for policy in (RouterMixture(), Uniform(), SingleExpert(2)):
        assert policy.mix(weights).sum(1).tolist() == pytest.approx([1.0] * len(rows), abs=1e-5)
    assert torch.equal(RouterMixture().mix(weights), weights)
    assert torch.equal(SingleExpert(1).mix(weights), torch.tensor([[0.0, 1.0, 0.0]] * len(rows)))


def test_an_expert_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"expert 3 does not exist: the controller has experts 0\.\.2"):
        SingleExpert(3).mix(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"expert 3 does not exist"):
        WithoutExpert(3).mix(torch.ones(1, 3))


@given(mixtures)
def test_without_an_expert_the_others_keep_their_weights(rows):
    weights = torch.tensor(rows)
    found = mixture_policy("without:1").mix(weights)
    assert torch.equal(found[:, [0, 2]], weights[:, [0, 2]]) and bool((found[:, 1] == 0).all())
    assert torch.equal(weights, torch.tensor(rows)), "the router's own mixture stays as it is"


def test_mixtures_change_what_is_edited_and_the_rows_say_which_it_was():
    backbone = tiny_backbone()
    batch = batch_of(backbone, some_prompts()[:2])
    controller = lively(backbone, ROUTED, policy=AlwaysOpen())
    outputs = []
    for mixture in (RouterMixture(), Uniform(), SingleExpert(0), SingleExpert(1)):
        with controller.with_mixture(mixture).apply(backbone, batch) as applied, torch.no_grad():
            outputs.append(backbone.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits)
        assert all(sum(row.mixture) == pytest.approx(1.0, abs=1e-5) for row in applied.rows())
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("policy", [Soft(), Hard(-1e9), ThresholdedSoft(-1e9)])
def test_a_learned_gate_stays_closed_on_a_logit_that_is_no_number_and_its_neighbour_does_not(policy, value, monkeypatch):
    backbone = tiny_backbone()
    controller = lively(backbone, ROUTED.resolved(backbone), policy=policy)
    z = torch.randn(2, controller.config.n_features(backbone.d_model))
    route = type(controller.weights).route

    def broken(self, z):
        logit, mixture = route(self, z)
        return torch.cat([torch.tensor([value]), logit[1:]]), mixture

    monkeypatch.setattr(type(controller.weights), "route", broken)
    first, second = controller.decide(z, labelled(2)).rows()
    assert first.gate == 0.0 and not math.isfinite(first.logit)
    assert second.gate > 0 and math.isfinite(second.logit)
