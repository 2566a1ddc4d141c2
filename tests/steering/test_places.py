"""Where RepIt and the answer vectors edit: found again by trying every place by the long way."""

from __future__ import annotations

import pytest
import torch

from paving.backbone import render_batch, render_ids
from paving.backbone.hooks import edit_residuals, record_residuals
from paving.prompts.types import Bucket, SplitName
from paving.steering.addition import Addition
from paving.steering.best_block import best_block
from paving.steering.checks import SteeringError
from paving.steering.refusal_score import refusal_tokens
from paving.steering.repit_place import PlaceConfig, best_place
from tiny_material import tiny_material
from tiny_models import logits_of, tiny_backbone


@pytest.fixture(scope="module")
def llama():
    return tiny_backbone()


@pytest.fixture(scope="module")
def material(llama):
    return tiny_material(llama)


def states(backbone, prompts, layer, position):
    found = []
    for p in prompts:
        with torch.no_grad(), record_residuals(backbone, (layer,)) as seen:
            backbone.model(input_ids=torch.tensor([render_ids(backbone, p.text)]), use_cache=False)
        found.append(seen[layer][0, position].double())
    return torch.stack(found)


def first_log_p(backbone, p, edit=None):
    """(vocab,) float64 behind the prompt alone. edit: layer -> what its output becomes"""
    with edit_residuals(backbone, edit or {}):
        return logits_of(backbone, render_batch(backbone, [p]))[0, -1].double().log_softmax(-1)


@pytest.fixture(scope="module")
def places(llama, material):
    """(layer, position) -> (KL on benign prompts, refusal score of edit prompts), each prompt by itself."""
    edit, benign = (material.of(SplitName.TRAIN, b) for b in (Bucket.EDIT, Bucket.BENIGN_KEEP))
    tokens = list(refusal_tokens(material).ids)
    found = {}
    for layer in range(3):  # 0.8 of six blocks, counted as the inputs of those behind them
        for position in (-2, -1):  # <eos> <assistant>
            centre = states(llama, benign, layer, position).mean(0)
            vector = states(llama, edit, layer, position).mean(0) - centre
            if not vector.norm() > 1e-4:  # at the first block, say, where all prompts end alike
                continue
            unit = vector / vector.norm()

            def without(x, unit=unit.float(), level=(centre @ unit).float()):
                return x - ((x @ unit) - level)[..., None] * unit

            kls = []
            for p in material.of(SplitName.CALIBRATION, Bucket.BENIGN_KEEP):
                base, other = first_log_p(llama, p), first_log_p(llama, p, {layer: without})
                kls.append((base.exp() * (base - other)).sum().item())
            scores = []
            for p in material.of(SplitName.CALIBRATION, Bucket.EDIT):
                share = first_log_p(llama, p, {layer: without}).exp()[tokens].sum()
                scores.append(((share + 1e-8).log() - (1 - share + 1e-8).log()).item())
            found[layer, position] = (sum(kls) / len(kls), sum(scores) / len(scores))
    return found


def test_repits_place_takes_most_refusals_away_among_those_that_leave_benign_prompts_alone(llama, material, places):
    limits = sorted(kl for kl, _ in places.values())
    chosen = set()
    for limit in (limits[1] * 1.001, limits[len(limits) // 2] * 1.001, limits[-1] * 1.001):
        allowed = {place: score for place, (kl, score) in places.items() if kl <= limit}
        wanted = min(allowed, key=allowed.get)
        found = best_place(llama, material, refusal_tokens(material), PlaceConfig(kl_limit=limit))
        assert (found.layer, found.position) == wanted and found.limit == limit
        assert found.kl == pytest.approx(places[wanted][0], rel=1e-2, abs=1e-5)
        assert found.refusal == pytest.approx(places[wanted][1], abs=1e-2)
        chosen.add(wanted)
    assert len(chosen) > 1  # the limit decides


def test_a_limit_that_no_place_keeps_to_is_doubled_and_said_or_refused(llama, material, places):
    least = min(kl for kl, _ in places.values())
    tokens = refusal_tokens(material)
    assert best_place(llama, material, tokens, PlaceConfig(kl_limit=least / 3)).limit == pytest.approx(least / 3 * 4)
    with pytest.raises(SteeringError, match=f"none of {len(places)} places keeps"):
        best_place(llama, material, tokens, PlaceConfig(kl_limit=least / 3, widen=0))


def test_the_block_of_an_answer_vector_makes_targets_likelier_than_refusals_by_most(llama, material):
    generator = torch.Generator().manual_seed(5)
    vectors = {layer: 4 * torch.randn(llama.d_model, generator=generator) for layer in (1, 3, 5)}
    prompts = material.of(SplitName.CALIBRATION, Bucket.EDIT)

    def likelihood(p, answer, layer) -> float:
        ids = render_ids(llama, p.text)

        def added(x):
            moved = x.clone()
            moved[:, len(ids) - 1 :] += vectors[layer]
            return moved

        with torch.no_grad(), edit_residuals(llama, {layer: added}):
            log_p = llama.model(input_ids=torch.tensor([[*ids, *answer]]), use_cache=False).logits[0].log_softmax(-1)
        return sum(log_p[len(ids) - 1 + i, t].item() for i, t in enumerate(answer)) / len(answer)

    def margin(layer) -> float:
        each = (
            likelihood(p, material.targets[p.id][:4], layer) - likelihood(p, material.answers[p.id][:4], layer)
            for p in prompts
        )
        return sum(each) / len(prompts)

    expected = {layer: margin(layer) for layer in vectors}
    found = best_block(
        llama, material, lambda layer: Addition(vectors[layer], layer, "answer"), vectors, answer_tokens=4, batch_size=3
    )
    assert found.margins == pytest.approx(expected, abs=1e-3) and found.layer == max(expected, key=expected.get)
    with pytest.raises(SteeringError, match="none of 0 blocks"):
        best_block(llama, material, lambda layer: None, (), answer_tokens=4)
