"""Scores of channels against what really happens when a channel is patched."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

from paving.backbone import pad_left, render_ids
from paving.backbone.hooks import edit_module_inputs, edit_module_outputs
from paving.backbone.projections import ffn_outputs
from paving.circuit.attribution import AttributionConfig, attribute
from paving.circuit.mask import CircuitError, check_told_apart
from paving.circuit.objective import objective, references
from paving.circuit.pairs import Pair
from paving.circuit.token_pairs import last_logits
from tiny_edges import linear
from tiny_models import hooks_on, tiny_backbone
from tiny_pairs import OPENINGS, tiny_pairs

PAIRS = tiny_pairs(4)


def first_logit(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 7].double()


def patched_effect(backbone, pair: Pair, layer: int, channel: int, reading: str) -> float:
    """J with one channel at its benign value everywhere, taken from J at the harmful prompt: exact, one run a channel."""
    projection = ffn_outputs(backbone)[layer]
    ids, mask = pad_left(backbone, [render_ids(backbone, pair.harmful), render_ids(backbone, pair.benign)])
    aligned = (mask[:1] * mask[1:]).bool()
    seen = {}
    hooks = edit_module_inputs if reading == "neurons" else edit_module_outputs

    def keep(*activation):
        seen["channels"] = activation[-1]

    with torch.no_grad(), hooks({projection.module: keep}):
        last_logits(backbone, ids[1:], mask[1:])
    benign = seen["channels"]

    def patch(*activation):
        changed = activation[-1].clone()
        changed[..., channel] = torch.where(aligned, benign[..., channel], changed[..., channel])
        return changed

    with torch.no_grad():
        whole = first_logit(last_logits(backbone, ids[:1], mask[:1]))
        with hooks({projection.module: patch}):
            return (whole - first_logit(last_logits(backbone, ids[:1], mask[:1]))).item()


@pytest.mark.parametrize("reading", ["neurons", "outputs"])
@pytest.mark.parametrize("path", ["inputs", "activations"])
def test_on_a_linear_model_a_score_is_the_effect_of_patching(reading, path):
    backbone = linear(
        "llama", layers=4, dtype=torch.float32
    )  # attention without a softmax, so that what tokens differ in reaches the last one
    config = AttributionConfig(reading=reading, path=path, first=0)
    effects = []
    for pair in PAIRS[:2]:
        scores = attribute(backbone, [pair], first_logit, config)
        for layer in (0, 1, 2):  # of the last layer only the last token is read, which is the same on both sides
            for channel in (0, 5, 17, 31):
                effects.append(abs(patched_effect(backbone, pair, layer, channel, reading)))
                assert scores[layer][channel].item() == pytest.approx(effects[-1], abs=1e-5, rel=1e-5)
    assert sorted(effects)[len(effects) // 2] > 1e-2


def test_on_a_real_decoder_scores_rank_channels_nearly_as_patching_does():
    backbone = tiny_backbone()
    layers = (3, 5)
    exact = [abs(patched_effect(backbone, PAIRS[0], layer, c, "neurons")) for layer in layers for c in range(48)]

    def agreement(config: AttributionConfig) -> float:
        scores = attribute(backbone, PAIRS[:1], first_logit, config)
        return spearmanr(torch.cat([scores[layer] for layer in layers]), exact).statistic

    assert agreement(AttributionConfig(path="activations", steps=8)) > 0.85
    assert agreement(AttributionConfig(path="inputs", steps=3)) > 0.5


def test_integrated_gradients_of_one_layer_add_up_to_what_patching_the_whole_layer_does():
    """Completeness: over all channels of a layer the signed scores sum to J(harmful) − J(layer at benign)."""
    backbone = tiny_backbone()
    pair = PAIRS[1]
    config = AttributionConfig(path="activations", steps=100, signed=True, first=3)
    score = -attribute(backbone, [pair], first_logit, config)[3].sum().item()
    projection = ffn_outputs(backbone)[3]
    ids, mask = pad_left(backbone, [render_ids(backbone, pair.harmful), render_ids(backbone, pair.benign)])
    aligned, seen = (mask[:1] * mask[1:]).bool().unsqueeze(-1), {}
    with torch.no_grad(), edit_module_inputs({projection.module: lambda x: seen.update(x=x)}):
        last_logits(backbone, ids[1:], mask[1:])
    with torch.no_grad():
        whole = first_logit(last_logits(backbone, ids[:1], mask[:1]))
        with edit_module_inputs({projection.module: lambda x: torch.where(aligned, seen["x"], x)}):
            patched = first_logit(last_logits(backbone, ids[:1], mask[:1]))
    assert score == pytest.approx((whole - patched).item(), abs=0.02 * abs(whole - patched).item() + 1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3", "phi3"])
def test_a_pair_is_scored_in_a_batch_as_it_is_alone(architecture):
    backbone = tiny_backbone(architecture)
    j = objective(references(backbone, PAIRS, OPENINGS))
    together = attribute(backbone, PAIRS, j, AttributionConfig(batch_size=4))
    alone = [attribute(backbone, [p], j, AttributionConfig()) for p in PAIRS]
    for layer, scores in together.items():
        torch.testing.assert_close(scores, sum(a[layer] for a in alone) / len(PAIRS), rtol=1e-3, atol=1e-7)


def test_the_first_block_is_left_out_and_the_model_is_left_as_it_was():
    backbone = tiny_backbone()
    before = {name: p.clone() for name, p in backbone.model.named_parameters()}
    scores = attribute(backbone, PAIRS, first_logit, AttributionConfig())
    assert sorted(scores) == [1, 2, 3, 4, 5] and all(s.shape == (48,) for s in scores.values())
    assert hooks_on(backbone.model) == []
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in backbone.model.named_parameters())


def test_a_signed_score_keeps_opposite_pairs_apart():
    """|score| adds what a signed mean cancels."""
    backbone = tiny_backbone()
    there, back = PAIRS[0], Pair("back", PAIRS[0].benign, PAIRS[0].harmful)
    absolute = attribute(backbone, [there, back], first_logit, AttributionConfig(steps=8))
    signed = attribute(backbone, [there, back], first_logit, AttributionConfig(steps=8, signed=True))
    assert sum(s.abs().sum() for s in signed.values()) < sum(s.sum() for s in absolute.values())


def test_j_is_the_difference_of_two_divergences():
    backbone = tiny_backbone()
    reference = references(backbone, PAIRS, OPENINGS)
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    p = logits.log_softmax(-1)

    def divergence(q):
        return (torch.special.xlogy(q, q) - q * p).sum(-1)

    torch.testing.assert_close(
        objective(reference)(logits), divergence(reference.refuse) - divergence(reference.comply), rtol=1e-4, atol=1e-4
    )
    assert reference.refuse.sum().item() == pytest.approx(1, abs=1e-5)


def test_references_of_the_openings_themselves_are_their_first_tokens():
    backbone = tiny_backbone()
    reference = references(backbone, PAIRS, OPENINGS, kind="opening")
    firsts = {backbone.tokenizer(phrase)["input_ids"][0] for phrase in OPENINGS.refusal}
    assert set(reference.refuse.nonzero().flatten().tolist()) <= firsts
    assert reference.refuse.sum().item() == pytest.approx(1)


def test_a_category_without_pairs_is_one_clear_error():
    backbone = tiny_backbone()
    with pytest.raises(CircuitError, match="0 pairs"):
        attribute(backbone, [], first_logit, AttributionConfig())
    with pytest.raises(CircuitError, match="without pairs"):
        references(backbone, [], OPENINGS)
    with pytest.raises(CircuitError, match="0 blocks from 6"):
        attribute(backbone, PAIRS, first_logit, AttributionConfig(first=6))


def test_scores_that_are_no_numbers_choose_no_circuit():
    with pytest.raises(CircuitError, match=r"no numbers in layer 1: .*overflow in float32"):
        attribute(tiny_backbone(), PAIRS, lambda logits: logits[:, 7] * float("inf"), AttributionConfig())


def test_scores_that_tell_no_channel_from_another_choose_no_circuit():
    same = [Pair(p.id, p.harmful, p.harmful) for p in PAIRS]
    nothing = attribute(tiny_backbone(), same, first_logit, AttributionConfig())
    with pytest.raises(CircuitError, match="every channel of layer 1 the same score"):
        check_told_apart(nothing, "global")
    scores = attribute(tiny_backbone(), PAIRS, first_logit, AttributionConfig())
    check_told_apart(scores, "layer")
    flat = scores | {3: torch.zeros_like(scores[3])}  # gradients that vanished in one layer
    check_told_apart(flat, "global")  # it is left out
    with pytest.raises(CircuitError, match="layer 3"):
        check_told_apart(flat, "layer")
