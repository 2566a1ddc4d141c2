"""RepIt: the part of the target's vector that other concepts do not share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_refusals import holds_to_the_protocol, last_states, material, train_and_calibration

from paving.backbone import render_batch
from paving.backbone.hooks import record_residuals
from paving.prompts.types import Bucket
from paving.steering.checks import SteeringError
from paving.steering.repit import (
    REST,
    IsolatedDirection,
    RepItConfig,
    Trial,
    choose,
    concept_vectors,
    concepts,
    fit_repit,
    isolate,
    refined,
)
from tiny_models import logits_of, prompt, tiny_backbone

LAYER = 3
SMALL = RepItConfig(smallest=3)


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


def random_vectors(d: int = 64, n: int = 5, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    shared = torch.randn(d, generator=generator, dtype=torch.float64)  # concepts of refusal lie close to each other
    others = shared + 0.7 * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return scale * (shared + torch.randn(d, generator=generator, dtype=torch.float64)), scale * others


def published_pipeline(target, others, rho, *, weights="invnorm", ridge_scale=1e-4):
    """The whole published computation for one layer and position, in float64, after the code that the authors released.

    Reweight the non-target vectors, whiten with the Cholesky factor of their regularised covariance, project the target off
    their span there by 1 - sqrt(1 - rho), un-whiten. Left out are what it does with several targets (a mean), and its two
    fallbacks for factorisations that fail.
    """
    if weights == "invnorm":
        w = 1 / (others.norm(dim=1) + 1e-6)
    elif weights == "sim":
        w = torch.nn.functional.cosine_similarity(others, target[None], dim=1).abs()
    else:
        w = torch.ones(len(others), dtype=others.dtype)
    weighted = others * (w / (w.sum() + 1e-6))[:, None]
    ridge = ridge_scale * weighted.pow(2).mean() + 1e-12
    covariance = weighted.T @ weighted / len(others) + ridge * torch.eye(len(target), dtype=target.dtype)
    factor = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(factor, torch.cat([target[:, None], weighted.T], dim=1), upper=False)
    basis = torch.linalg.qr(white[:, 1:]).Q
    cleaned = white[:, 0] - (1 - (1 - rho) ** 0.5) * (basis @ (basis.T @ white[:, 0]))
    return factor @ cleaned


@pytest.mark.parametrize("rho", [0.0, 0.33, 0.75, 0.99, 1.0])
@pytest.mark.parametrize("weights", ["invnorm", "sim", "uniform"])
@pytest.mark.parametrize("n", [1, 5, 20])
def test_the_shortcut_is_the_published_whitening_pipeline(rho, weights, n):
    target, others = random_vectors(n=n)
    torch.testing.assert_close(
        isolate(target, others, rho), published_pipeline(target, others, rho, weights=weights), atol=1e-8, rtol=0
    )


def test_the_ridge_cancels_too_and_the_pipeline_is_not_trivially_equal():
    target, others = random_vectors(scale=30)
    for ridge_scale in (1e-4, 1e-2, 10.0):
        published = published_pipeline(target, others, 0.75, ridge_scale=ridge_scale)
        torch.testing.assert_close(isolate(target, others, 0.75), published, atol=1e-8, rtol=0)
    assert (isolate(target, others, 0.7) - published_pipeline(target, others, 0.75)).abs().max() > 0.1


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_a_share_rho_of_the_energy_in_the_span_is_gone_and_the_rest_untouched(rho):
    target, others = random_vectors()
    basis = torch.linalg.qr(others.T).Q
    found = isolate(target, others, rho)
    inside, before = basis.T @ found, basis.T @ target
    torch.testing.assert_close(inside, (1 - rho) ** 0.5 * before)
    assert (inside.norm() ** 2).item() == pytest.approx((1 - rho) * (before.norm() ** 2).item(), abs=1e-9)
    torch.testing.assert_close(found - basis @ inside, target - basis @ before)


def test_concepts_with_one_vector_span_one_dimension():
    target, others = random_vectors(n=3)
    doubled = torch.cat([others, 2 * others[:1], others[1:2]])
    torch.testing.assert_close(isolate(target, doubled, 0.8), isolate(target, others, 0.8))


def test_concepts_are_sources_where_there_are_several_else_groups_and_small_ones_are_one():
    rows = [prompt(f"h{i}", [i], Bucket.HARMFUL_KEEP) for i in range(9)]
    by_source = [replace(p, source="aaaab"[i % 5]) for i, p in enumerate(rows)]
    assert {k: len(v) for k, v in concepts(by_source, 2).items()} == {"source a": 8, REST: 1}
    assert {k: len(v) for k, v in concepts(by_source, 1).items()} == {"source a": 8, "source b": 1}
    grouped = [replace(p, source="one", group="xxxyyyzzw"[i]) for i, p in enumerate(rows)]
    assert {k: len(v) for k, v in concepts(grouped, 3).items()} == {"group x": 3, "group y": 3, REST: 3}
    assert {k: len(v) for k, v in concepts(rows, 2).items()} == {REST: 9}  # every prompt its own group: one vector


@pytest.mark.parametrize("position", [-1, -3])
def test_vectors_are_means_of_the_states_that_transformers_records(backbone, position):
    vectors, centre = concept_vectors(backbone, material(), layer=LAYER, position=position, config=SMALL)
    states = {b: last_states(backbone, train_and_calibration(material(), b)[0], position)[:, LAYER] for b in Bucket}
    benign, harmful = states[Bucket.BENIGN_KEEP].mean(0), states[Bucket.HARMFUL_KEEP]
    expected = {
        "edit": states[Bucket.EDIT].mean(0) - benign,
        "source a": harmful[0::2].mean(0) - benign,
        "source b": harmful[1::2].mean(0) - benign,
    }
    assert vectors.keys() == expected.keys()
    for name, vector in expected.items():
        torch.testing.assert_close(vectors[name], vector, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(centre, benign, atol=1e-5, rtol=1e-5)


def test_rho_is_what_the_calibration_prompts_want(backbone):
    asked = []

    def score(editor: IsolatedDirection) -> tuple[float, float]:
        asked.append(editor.rho)
        assert editor.unit.norm().item() == pytest.approx(1, abs=1e-6)
        return 1 - editor.rho**2, 0.5 * (1 - editor.rho)

    config = RepItConfig(smallest=3, rhos=(0.6, 0.0, 1.0))
    found = fit_repit(backbone, material(), score, layer=LAYER, config=config)
    assert asked == [0.0, 0.6, 1.0, 0.8, 0.7, 0.9]  # 0.5 (1 - rho) crosses 0.1 at 0.8; then the halves beside it
    assert found.rho == 0.8 and found.within_limit and found.concepts == ("source a", "source b")
    assert [t.rho for t in found.trials] == sorted(asked)
    vectors, centre = concept_vectors(backbone, material(), layer=LAYER, position=-1, config=SMALL)
    target = vectors.pop("edit")
    direction = isolate(target, torch.stack(list(vectors.values())), 0.8)
    unit = direction / direction.norm()
    torch.testing.assert_close(found.unit, unit.float())
    assert found.level == pytest.approx((centre @ unit).item())


def test_the_choice_and_its_ties():
    trials = [Trial(0.0, 0.9, 0.5), Trial(0.3, 0.7, 0.1), Trial(0.6, 0.7, 0.05), Trial(0.9, 0.6, 0.0)]
    assert choose(trials, 0.1) == (trials[1], True)
    assert choose(trials[:1], 0.1) == (trials[0], False)
    assert choose([Trial(0.0, 0.9, 0.5), Trial(0.3, 0.2, 0.4), Trial(0.6, 0.3, 0.4)], 0.1) == (Trial(0.6, 0.3, 0.4), False)


def test_the_crossing_is_refined_and_nothing_else():
    trials = [Trial(0.0, 1, 0.5), Trial(0.5, 1, 0.3), Trial(1.0, 1, 0.1)]
    assert refined(trials, 0.2, 1) == [0.75] and refined(trials, 0.2, 2) == [0.62, 0.88] and refined(trials, 0.2, 0) == []
    assert refined(trials, 0.05, 3) == [] and refined(trials, 0.6, 3) == []


def test_what_cannot_be_fitted_is_said(backbone):
    with pytest.raises(SteeringError, match="shares between 0 and 1"):
        fit_repit(backbone, material(), lambda _: (float("nan"), 0.0), layer=LAYER)
    with pytest.raises(SteeringError, match="-1 to -"):
        fit_repit(backbone, material(), lambda _: (1.0, 0.0), layer=LAYER, position=-50)
    with pytest.raises(SteeringError, match="-1 to -"):
        fit_repit(backbone, material(), lambda _: (1.0, 0.0), layer=LAYER, position=0)
    harmful, edit = (train_and_calibration(material(), b)[0] for b in (Bucket.HARMFUL_KEEP, Bucket.EDIT))
    same = {p.id: replace(p, text=e.text) for p, e in zip(harmful, edit, strict=True)}
    splits = material().splits
    twins = replace(material(), splits=replace(splits, train=tuple(same.get(p.id, p) for p in splits.train)))
    for batch_size in (1, 3, 16):  # a twin's state differs from its own in the last bits where their batches differ
        config = RepItConfig(rhos=(1.0,), smallest=99, batch_size=batch_size)
        with pytest.raises(SteeringError, match="in the span of 1 other"):
            fit_repit(backbone, twins, lambda _: (1.0, 0.0), layer=LAYER, config=config)


def test_the_component_becomes_that_of_the_mean_benign_state(backbone):
    editor = fit_repit(backbone, material(), lambda _: (1.0, 0.0), layer=LAYER, config=SMALL)
    batch = render_batch(backbone, train_and_calibration(material(), Bucket.EDIT)[1])
    with editor.editing(backbone, batch, torch.ones(4)), record_residuals(backbone, [LAYER - 1, LAYER]) as seen:
        logits_of(backbone, batch)
    torch.testing.assert_close(seen[LAYER] @ editor.unit, torch.full((4, batch.width), editor.level), atol=1e-5, rtol=0)
    with record_residuals(backbone, [LAYER - 1]) as before:
        logits_of(backbone, batch)
    assert torch.equal(seen[LAYER - 1], before[LAYER - 1])  # one layer is edited


def test_rows_are_edited_one_by_one(backbone):
    holds_to_the_protocol(backbone, fit_repit(backbone, material(), lambda _: (1.0, 0.0), layer=LAYER, config=SMALL))
