"""Stage 2: training the slices alone is training the whole weight with its gradient masked, and nothing else moves."""

from __future__ import annotations

import random

import pytest
import torch

from paving.backbone import BackboneError, render_ids
from paving.backbone.projections import ffn_outputs
from paving.circuit.arithmetic import ArithmeticConfig, fine_tuned, weight_delta
from paving.circuit.mask import CircuitError, Mask, choose
from paving.circuit.slices import CircuitEdit, SliceDelta, check_off_circuit, off_circuit, slice_of
from paving.training.opening_examples import Example, opening_examples
from paving.training.packing import answer_cross_entropy, check_packing, packed_logits
from tiny_deltas import gpt2_backbone
from tiny_models import batch_of, hooks_on, logits_of, some_prompts, tiny_backbone
from tiny_pairs import OPENINGS, tiny_pairs

PAIRS = tiny_pairs(6)
TEXTS = [p.harmful for p in PAIRS]
QUICK = ArithmeticConfig(epochs=2, batch_size=4, learning_rate=1e-2)


def some_mask(backbone, reading: str = "neurons") -> Mask:
    n = 48 if reading == "neurons" else 32
    scores = {layer: torch.rand(n, generator=torch.Generator().manual_seed(layer)) for layer in range(1, 6)}
    return choose(scores, reading, 0.25)


def own_rows(backbone) -> list[Example]:
    return [Example(render_ids(backbone, p.benign), [20, 21, 22]) for p in PAIRS]


@pytest.mark.parametrize("reading", ["neurons", "outputs"])
def test_training_the_slices_is_training_the_weights_under_a_gradient_mask(reading):
    backbone, mask = tiny_backbone(), some_mask(tiny_backbone(), reading)
    found = fine_tuned(backbone, TEXTS, mask, "refusal", OPENINGS, QUICK)

    # The same by the long way: every FFN output weight is a parameter, its gradient is masked, Adam runs on all of it.
    other = tiny_backbone()
    weights = {layer: p.module.weight.requires_grad_() for layer, p in ffn_outputs(other).items() if layer in mask.channels}
    before = {layer: w.detach().clone() for layer, w in weights.items()}
    optimiser = torch.optim.Adam(weights.values(), lr=QUICK.learning_rate)
    rng = random.Random(QUICK.seed)
    for epoch in range(QUICK.epochs):
        rows = opening_examples(other, TEXTS, OPENINGS.refusal, seed=QUICK.seed, epoch=epoch)
        rows = rng.sample(rows, len(rows))
        for start in range(0, len(rows), QUICK.batch_size):
            optimiser.zero_grad()
            answer_cross_entropy(other, rows[start : start + QUICK.batch_size], packing=False).backward()
            for layer, w in weights.items():
                kept = torch.zeros_like(w)
                kept.index_fill_(1 if reading == "neurons" else 0, mask.index(layer), 1.0)
                w.grad.mul_(kept)
            optimiser.step()
    for layer, w in weights.items():
        change = w.detach() - before[layer]
        torch.testing.assert_close(found[layer], slice_of(change, mask, layer), rtol=1e-2, atol=1e-3)
        assert found[layer].abs().max() > 1e-3


@pytest.mark.parametrize("retain", ["none", "ce", "kl"])
def test_training_leaves_the_base_its_bits_and_no_hook(retain):
    backbone = tiny_backbone()
    before = {name: p.clone() for name, p in backbone.model.named_parameters()}
    config = QUICK.model_copy(update={"retain": retain})
    weight_delta(backbone, PAIRS, some_mask(backbone), OPENINGS, config, own=own_rows(backbone))
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in backbone.model.named_parameters())
    assert hooks_on(backbone.model) == []


def test_the_delta_is_the_difference_of_the_two_fine_tunes_in_the_bases_dtype():
    backbone, mask = tiny_backbone(dtype=torch.bfloat16), some_mask(tiny_backbone())
    plus = fine_tuned(backbone, TEXTS, mask, "refusal", OPENINGS, QUICK)
    minus = fine_tuned(backbone, TEXTS, mask, "compliance", OPENINGS, QUICK)
    both = weight_delta(backbone, PAIRS, mask, OPENINGS, QUICK)
    alone = weight_delta(backbone, PAIRS, mask, OPENINGS, QUICK.model_copy(update={"minus": False}))
    for layer in mask.channels:
        assert both.values[layer].dtype == torch.bfloat16
        assert torch.equal(both.values[layer], (plus[layer] - minus[layer]).to(torch.bfloat16))
        assert torch.equal(alone.values[layer], plus[layer].to(torch.bfloat16))


def test_training_lowers_its_loss_and_is_fixed_by_its_seed():
    backbone, mask = tiny_backbone(), some_mask(tiny_backbone())
    losses = []
    config = QUICK.model_copy(update={"epochs": 6})
    first = weight_delta(backbone, PAIRS, mask, OPENINGS, config, watch=lambda *a: losses.append((a[0], a[3]["ce"])))
    second = weight_delta(backbone, PAIRS, mask, OPENINGS, config)
    refusal = [value for name, value in losses if name.startswith("refusal")]
    assert sum(refusal[-2:]) < sum(refusal[:2])
    assert all(torch.equal(first.values[layer], second.values[layer]) for layer in mask.channels)
    other = weight_delta(backbone, PAIRS, mask, OPENINGS, config.model_copy(update={"seed": 1}))
    assert any(not torch.equal(first.values[layer], other.values[layer]) for layer in mask.channels)


def test_a_retain_term_keeps_the_benign_answers_closer_to_the_base():
    backbone, mask = tiny_backbone(), some_mask(tiny_backbone())
    own = own_rows(backbone)

    def drift(config: ArithmeticConfig) -> float:
        delta = weight_delta(backbone, PAIRS, mask, OPENINGS, config, own=own)
        with torch.no_grad():
            base, _ = packed_logits(backbone, own)
            with CircuitEdit(delta, 1.0).written(backbone):
                edited, _ = packed_logits(backbone, own)
        p, q = base.log_softmax(-1), edited.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean().item()

    free = QUICK.model_copy(update={"epochs": 5})
    held = free.model_copy(update={"retain": "kl", "retain_weight": 5.0})
    assert drift(held) < 0.8 * drift(free)


def test_the_edit_is_in_the_circuit_alone_and_is_taken_back_bit_for_bit():
    backbone = tiny_backbone(dtype=torch.bfloat16)
    mask = some_mask(backbone)
    delta = weight_delta(backbone, PAIRS, mask, OPENINGS, QUICK)
    before = {name: p.clone() for name, p in backbone.model.named_parameters()}
    batch = batch_of(backbone, some_prompts())
    base = logits_of(backbone, batch)
    edit = CircuitEdit(delta, 1.5)
    projections = ffn_outputs(backbone)
    with edit.apply(backbone, batch) as applied:
        assert [r.gate for r in applied.rows()] == [1.0] * len(batch)
        assert not torch.equal(logits_of(backbone, batch), base)
        for name, p in backbone.model.named_parameters():
            layer = next((at for at, q in projections.items() if q.parameter == name and at in mask.channels), None)
            changed = (p != before[name]).any(0).nonzero().flatten().tolist() if layer is not None else []
            assert set(changed) <= set(mask.channels.get(layer, ()))
            assert layer is not None or torch.equal(p, before[name])
    with pytest.raises(RuntimeError, match="inside"), edit.apply(backbone, batch):
        raise RuntimeError("inside")
    assert all(torch.equal(p, before[n]) for n, p in backbone.model.named_parameters())
    assert torch.equal(logits_of(backbone, batch), base)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "olmo2"])
def test_packed_rows_are_answered_as_each_is_alone(architecture):
    backbone = tiny_backbone(architecture)
    rows = opening_examples(backbone, TEXTS, OPENINGS.refusal, seed=0)
    rows = [Example(r.prompt[-4:], r.answer) for r in rows]  # within the tiny models' sliding windows
    logits, answers = packed_logits(backbone, rows)
    alone = [packed_logits(backbone, [row]) for row in rows]
    torch.testing.assert_close(logits, torch.cat([a for a, _ in alone]), rtol=1e-3, atol=1e-4)
    assert answers.tolist() == [t for row in rows for t in row.answer]
    check_packing(backbone, rows)


def test_a_model_that_packing_would_change_is_refused():
    backbone = tiny_backbone("mistral")  # slides a window of 4096 by default
    backbone.model.config.sliding_window = 4
    rows = opening_examples(backbone, TEXTS, OPENINGS.refusal, seed=0)
    with pytest.raises(BackboneError, match="slides a window of 4 tokens"):
        check_packing(backbone, rows)


def test_one_long_row_of_a_later_batch_is_refused_and_so_is_a_long_answer_to_keep():
    backbone = tiny_backbone("mistral")
    mask = some_mask(backbone)
    longest = max(len(r.prompt) + len(r.answer) for r in opening_examples(backbone, TEXTS, OPENINGS.refusal, seed=0))
    backbone.model.config.sliding_window = longest + 4
    long = " ".join(["w9"] * 20)
    config = ArithmeticConfig(epochs=1, batch_size=2)
    with pytest.raises(BackboneError, match="slides a window"):
        fine_tuned(backbone, [*TEXTS, long], mask, "refusal", OPENINGS, config)
    own = [Example([1, 5, 6], [7] * 60)]
    with pytest.raises(BackboneError, match="slides a window"):
        fine_tuned(backbone, TEXTS, mask, "refusal", OPENINGS, config.model_copy(update={"retain": "ce"}), own)
    fine_tuned(backbone, TEXTS, mask, "refusal", OPENINGS, config)


def test_bad_input_is_one_clear_error():
    backbone = tiny_backbone()
    mask = some_mask(backbone)
    with pytest.raises(CircuitError, match="no pairs"):
        weight_delta(backbone, [], mask, OPENINGS, QUICK)
    with pytest.raises(CircuitError, match="own answers"):
        weight_delta(backbone, PAIRS, mask, OPENINGS, QUICK.model_copy(update={"retain": "kl"}))
    with pytest.raises(CircuitError, match="names layer 9"):
        weight_delta(backbone, PAIRS, Mask("neurons", 48, {9: (1,)}), OPENINGS, QUICK)
    with pytest.raises(CircuitError, match="has 64 neurons"):
        weight_delta(backbone, PAIRS, Mask("neurons", 64, {2: (1,)}), OPENINGS, QUICK)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        weight_delta(backbone, PAIRS, mask, OPENINGS, QUICK.model_copy(update={"learning_rate": 1e38, "epochs": 4}))


def test_an_edit_of_another_model_writes_nothing():
    backbone = tiny_backbone()
    before = {n: p.clone() for n, p in backbone.model.named_parameters()}
    foreign = SliceDelta(Mask("neurons", 48, {7: (1,)}), {7: torch.zeros(32, 1)})
    with pytest.raises(CircuitError, match="layer 7"), CircuitEdit(foreign, 1.0).written(backbone):
        pass
    assert all(torch.equal(p, before[n]) for n, p in backbone.model.named_parameters())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("reading", ["neurons", "outputs"])
def test_one_flipped_bit_off_the_circuit_is_found_and_the_circuits_own_change_is_not(architecture, reading):
    backbone = gpt2_backbone() if architecture == "gpt2" else tiny_backbone()
    mask = some_mask(backbone, reading)
    before = off_circuit(backbone, mask)
    projections = ffn_outputs(backbone)
    values = {layer: torch.ones_like(slice_of(projections[layer].weight, mask, layer)) for layer in mask.channels}
    with CircuitEdit(SliceDelta(mask, values), 1.0).written(backbone):
        check_off_circuit(backbone, mask, before)
    assert off_circuit(backbone, mask) == before
    outside = next(c for c in range(mask.n) if c not in mask.channels[3])
    of_layer = projections[3].weight
    row = of_layer[:, outside] if reading == "neurons" else of_layer[outside]
    for name, tensor in (("layers.0", projections[0].weight[0]), (projections[3].parameter, row)):
        with torch.no_grad():
            tensor[:1].view(torch.int32).bitwise_xor_(1)
        with pytest.raises(CircuitError, match="outside the circuit have changed") as error:
            check_off_circuit(backbone, mask, before)
        assert name in str(error.value) or "h.0" in str(error.value)
        with torch.no_grad():
            tensor[:1].view(torch.int32).bitwise_xor_(1)
    check_off_circuit(backbone, mask, before)
