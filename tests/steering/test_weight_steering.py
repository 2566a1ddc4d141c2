"""WS: weights written for a batch and put back bit for bit; the two fine-tunes behind them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_steering import OPENINGS, PAIRS

from paving.generation import Decoding, generate
from paving.intervention import Identity
from paving.steering import (
    SteeringError,
    WeightDelta,
    WeightSteering,
    WeightSteeringConfig,
    fit_weight_steering,
    load_weight_delta,
    save_weight_delta,
    weight_steering,
)
from paving.training.opening_examples import opening_examples
from paving.training.packing import answer_cross_entropy
from tiny_models import batch_of, decode, logits_of, some_prompts, tiny_backbone

HARMFUL = [harmful for harmful, _ in PAIRS]
QUICK = WeightSteeringConfig(epochs=4, batch_size=4, learning_rate=5e-3)


def random_delta(backbone, size=0.02) -> WeightDelta:
    generator = torch.Generator().manual_seed(0)
    values = {
        name: (size * torch.randn(p.shape, generator=generator)).to(p.dtype) for name, p in backbone.model.named_parameters()
    }
    return WeightDelta(values, backbone.name, backbone.fingerprint, {})


def bits(backbone) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in backbone.model.state_dict().items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def own():
    """A base of this module's own: weight steering writes into it."""
    return tiny_backbone()


@pytest.fixture(scope="module")
def fitted(own) -> WeightDelta:
    return fit_weight_steering(own, HARMFUL, OPENINGS, QUICK)


# --- the intervention -----------------------------------------------------------------------------------------------


def test_inside_every_weight_is_moved_by_alpha_delta_and_outside_none(any_backbone):
    delta = random_delta(any_backbone)
    before, batch = bits(any_backbone), batch_of(any_backbone, some_prompts()[:3])
    base = logits_of(any_backbone, batch)
    with WeightSteering(delta, 0.5).apply(any_backbone, batch) as applied:
        for name, parameter in any_backbone.model.named_parameters():
            torch.testing.assert_close(parameter, before[name] + 0.5 * delta.values[name], atol=1e-7, rtol=1e-6)
        assert not torch.allclose(logits_of(any_backbone, batch), base, atol=1e-2)
    assert [row.gate for row in applied.rows()] == [1.0] * 3
    assert same(bits(any_backbone), before)
    assert torch.equal(logits_of(any_backbone, batch), base)


def test_alpha_0_leaves_the_base_bit_for_bit_and_says_so(own, prompts):
    batch = batch_of(own, prompts)
    before, base = bits(own), logits_of(own, batch)
    with WeightSteering(random_delta(own), 0.0).apply(own, batch) as applied:
        assert same(bits(own), before)
        assert torch.equal(logits_of(own, batch), base)
    assert [row.gate for row in applied.rows()] == [0.0] * len(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weights_come_back_after_an_error(prompts, dtype):
    backbone = tiny_backbone(dtype=dtype)
    before = bits(backbone)
    with pytest.raises(KeyError), WeightSteering(random_delta(backbone)).apply(backbone, batch_of(backbone, prompts)):
        assert not same(bits(backbone), before)
        raise KeyError
    assert same(bits(backbone), before)


def test_the_weights_come_back_when_writing_them_fails_half_way(own, prompts, monkeypatch):
    before, calls = bits(own), []

    def failing(base, change, alpha):
        calls.append(base)
        if len(calls) == 5:
            raise MemoryError
        return base + alpha * change

    monkeypatch.setattr(weight_steering, "edited", failing)
    with pytest.raises(MemoryError), WeightSteering(random_delta(own)).apply(own, batch_of(own, prompts)):
        pass
    assert len(calls) == 5 and same(bits(own), before)


def test_no_label_is_read(own, prompts, fitted):
    batch, texts = batch_of(own, prompts), []
    for bucket in (batch.bucket, (*batch.bucket[1:], batch.bucket[0]), (None,) * len(batch)):
        labelled = replace(batch, bucket=bucket)
        with WeightSteering(fitted).apply(own, labelled):
            texts.append(decode(own.model, labelled))
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_it_decodes_through_generate_and_leaves_the_base_as_it_was(own, prompts, fitted):
    short, before = Decoding(max_new_tokens=6), bits(own)
    base = generate(own, prompts, Identity(), short, batch_size=3)
    done = generate(own, prompts, WeightSteering(fitted), short, batch_size=3)
    assert same(bits(own), before)
    assert generate(own, prompts, Identity(), short, batch_size=3) == base
    assert sum(a.response != b.response for a, b in zip(base, done, strict=True)) >= len(prompts) // 2


def test_a_negative_alpha_is_refused(fitted):
    with pytest.raises(SteeringError, match="alpha is -1"):
        WeightSteering(fitted, -1.0)


def test_another_base_is_refused_and_left_alone(prompts, fitted):
    other = tiny_backbone(seed=1)
    before = bits(other)
    applied = WeightSteering(fitted).apply(other, batch_of(other, prompts))
    with pytest.raises(ValueError, match="was fitted on tiny-llama"), applied:
        pass
    assert same(bits(other), before)


def test_a_delta_that_does_not_fit_is_refused_before_anything_is_written(own, prompts):
    before, delta = bits(own), random_delta(own)
    last = list(delta.values)[-1]
    for broken in ({**delta.values, last: delta.values[last][:1]}, {**delta.values, "model.else": torch.ones(2)}):
        applied = WeightSteering(replace(delta, values=broken)).apply(own, batch_of(own, prompts))
        with pytest.raises(SteeringError, match="Fit it on this model"), applied:
            pass
    assert same(bits(own), before)


# --- fitting --------------------------------------------------------------------------------------------------------


def test_both_fine_tunes_learn_their_openings(fitted):
    assert set(fitted.losses) == {"refusal", "compliance"}
    for losses in fitted.losses.values():
        assert len(losses) == QUICK.epochs and losses[-1] < 0.7 * losses[0]


def test_the_difference_makes_refusal_openings_likelier_and_compliance_openings_less_likely(own, fitted, prompts):
    def losses():
        with torch.no_grad():
            rows = [opening_examples(own, HARMFUL, kind, seed=9) for kind in (OPENINGS.refusal, OPENINGS.compliance)]
            return [float(answer_cross_entropy(own, r, packing=True)) for r in rows]

    base = losses()
    with WeightSteering(fitted, 0.5).apply(own, batch_of(own, prompts)):
        steered = losses()
    assert steered[0] < base[0] - 0.5 and steered[1] > base[1] + 0.5


def test_fitting_is_fixed_by_its_seed_and_leaves_the_base(own, fitted):
    before = bits(own)
    again = fit_weight_steering(own, HARMFUL, OPENINGS, QUICK)
    assert same(dict(again.values), dict(fitted.values)) and again.losses == fitted.losses
    other = fit_weight_steering(own, HARMFUL, OPENINGS, QUICK.model_copy(update={"seed": 1}))
    assert not same(dict(other.values), dict(fitted.values))
    assert same(bits(own), before)
    assert not own.model.training and not any(p.requires_grad for p in own.model.parameters())


def test_the_delta_is_theta_plus_less_theta_minus(own):
    """Each side by itself: with the same phrases on both sides, the two fine-tunes are one and the difference is 0."""
    one_sided = replace(OPENINGS, compliance=OPENINGS.refusal)
    delta = fit_weight_steering(own, HARMFUL[:4], one_sided, QUICK.model_copy(update={"epochs": 1}))
    assert not any(bool(value.any()) for value in delta.values.values())


def test_every_weight_is_free_to_move_and_kept_in_the_bases_dtype():
    backbone = tiny_backbone("gemma3", dtype=torch.bfloat16)  # ties its embedding to its head
    delta = fit_weight_steering(backbone, HARMFUL, OPENINGS, QUICK.model_copy(update={"epochs": 1, "packing": False}))
    assert delta.values.keys() == dict(backbone.model.named_parameters()).keys()
    assert {v.dtype for v in delta.values.values()} == {torch.bfloat16}
    assert all(bool(v.any()) for v in delta.values.values())


def test_quantised_weights_are_refused(own):
    broken = copy.deepcopy(own.model)
    broken.quantization_method = "bitsandbytes"
    with pytest.raises(SteeringError, match="quantised"):
        fit_weight_steering(replace(own, model=broken), HARMFUL, OPENINGS, QUICK)


# --- the cache of a benchmark ---------------------------------------------------------------------------------------


def test_a_saved_delta_comes_back_as_it_was_and_holds_nothing_but_the_difference(own, fitted, tmp_path):
    save_weight_delta(fitted, tmp_path / "runs" / "ws.safetensors")
    found = load_weight_delta(tmp_path / "runs" / "ws.safetensors", own)
    assert same(dict(found.values), dict(fitted.values))
    assert (found.base_fingerprint, dict(found.losses)) == (fitted.base_fingerprint, dict(fitted.losses))
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["ws.safetensors"]
    with safe_open(tmp_path / "runs" / "ws.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(fitted.values)


def test_fitting_writes_no_file(own, fitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = []
    for write in ("safetensors.torch.serialize_file", "torch.save"):  # below whatever name a module knows them by
        monkeypatch.setattr(write, lambda *args, **_: written.append(args))
    fit_weight_steering(own, HARMFUL[:4], OPENINGS, QUICK.model_copy(update={"epochs": 1}))
    assert written == [] and list(tmp_path.iterdir()) == []
    with pytest.raises(SteeringError, match="cannot write"):  # as nothing is: what is watched is what saving calls
        save_weight_delta(fitted, tmp_path / "ws.safetensors")
    assert written


def test_files_that_are_no_delta_are_refused(own, fitted, tmp_path):
    path = tmp_path / "ws.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no weight delta"):
        load_weight_delta(path, own)
    save_weight_delta(fitted, path)
    with pytest.raises(ValueError, match="was fitted on tiny-llama"):
        load_weight_delta(path, tiny_backbone(seed=1))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(SteeringError, match="Remove it and fit again"):
        load_weight_delta(path, own)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(SteeringError, match="is no weight delta"):
        load_weight_delta(path, own)


def test_a_delta_that_cannot_be_written_leaves_nothing(fitted, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SteeringError, match="cannot write"):
        save_weight_delta(fitted, tmp_path / "file" / "ws.safetensors")
