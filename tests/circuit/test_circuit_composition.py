"""Several categories in one delta: disjoint channels keep their own edit, overlap is resolved, one can be taken out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paving.backbone.weights import edited, same_bits
from paving.circuit.checkpoint import apply_to, remove_from
from paving.circuit.compose import compose, subtract
from paving.circuit.delta import with_metrics
from paving.circuit.delta_files import load_delta, save_delta, weights_sha256
from paving.circuit.mask import CircuitError, Mask
from paving.circuit.slices import slice_of
from tiny_deltas import RATE, saved_llama, tiny_delta
from tiny_models import batch_of, logits_of, some_prompts, tiny_backbone

RULES = ("largest", "sum", "mean")
few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def base(request):
    return tiny_backbone(dtype=request.param)


@pytest.fixture(scope="module", params=["neurons", "outputs"])
def three(request, base):
    """Random circuits of a fifth to a half of the channels: they overlap."""
    return [
        tiny_delta(base, category, seed=i, reading=request.param, alpha=alpha, fraction=fraction)
        for i, (category, alpha, fraction) in enumerate((("hate", 1.7, 0.3), ("crime", 0.37, 0.5), ("health", 2.9, 0.2)))
    ]


def on(delta, mask, layer):
    """The delta's edited slice on a part of its mask."""
    axis = 1 if delta.mask.reading == "neurons" else 0
    own, wanted = delta.mask.channels[layer], mask.channels[layer]
    return delta.edited()[layer].index_select(axis, torch.tensor([own.index(c) for c in wanted]))


def same(one, other):
    return one.description == other.description and weights_sha256(one) == weights_sha256(other)


@pytest.mark.parametrize("overlap", RULES)
def test_disjoint_circuits_keep_their_own_edit_bit_for_bit(base, overlap):
    masks = [Mask("neurons", 48, {2: (0, 5, 9), 3: (1,)}), Mask("neurons", 48, {2: (3, 47), 4: (8,)})]
    deltas = [tiny_delta(base, c, mask=m, alpha=a) for c, m, a in zip("ab", masks, (0.37, 2.3), strict=True)]
    both = compose(deltas, overlap=overlap)
    assert both.mask.channels == {2: (0, 3, 5, 9, 47), 3: (1,), 4: (8,)}
    for delta in deltas:
        for layer, values in delta.edited().items():
            assert same_bits(on(both, delta.mask, layer), values)


@pytest.mark.parametrize("overlap", RULES)
def test_a_shared_channel_gets_what_the_rule_says(base, overlap):
    mask = Mask("neurons", 48, {2: (4, 7)})
    a, b = (tiny_delta(base, c, mask=mask, alpha=alpha, seed=i) for i, (c, alpha) in enumerate((("a", 2.0), ("b", 0.5))))
    changes = [d.alpha * d.parts[0].values[2].double() for d in (a, b)]
    wanted = {
        "sum": changes[0] + changes[1],
        "mean": (changes[0] + changes[1]) / 2,
        "largest": torch.where(changes[0].norm(dim=0) > changes[1].norm(dim=0), *changes),
    }
    both = compose([a, b], overlap=overlap)
    assert both.alpha == 1.0
    assert same_bits(both.edited()[2], edited(a.base[2], wanted[overlap], 1.0))


@pytest.mark.parametrize("overlap", RULES)
def test_the_order_of_the_deltas_does_not_matter(three, overlap):
    a, b, c = three
    first = compose([a, b, c], overlap=overlap)
    assert first.description.categories == ("crime", "hate", "health")
    assert same(first, compose([c, a, b], overlap=overlap))
    assert same(first, compose([compose([b, c], overlap=overlap), a], overlap=overlap))


@pytest.mark.parametrize("overlap", RULES)
def test_subtraction_is_composing_the_rest_from_scratch(three, overlap, tmp_path):
    whole = compose(three, overlap=overlap)
    loaded = load_delta(save_delta(whole, tmp_path / "whole"))
    for out in three:
        rest = compose([d for d in three if d is not out], overlap=overlap)
        for source in (whole, loaded):
            less = subtract(source, out.description.categories[0])
            assert same(less, rest)
            assert all(same_bits(less.base[n], rest.base[n]) for n in rest.base)
            assert all(same_bits(less.edited()[n], rest.edited()[n]) for n in rest.base)


def test_subtracting_down_to_one_gives_that_delta_back(three):
    a, b, _ = three
    a = with_metrics(a, {"harmful_refusal": RATE})
    assert same(subtract(compose([a, b]), "crime"), a)
    assert same(compose([a]), a)


@few
@given(seeds=st.lists(st.integers(0, 999), min_size=2, max_size=4, unique=True), overlap=st.sampled_from(RULES))
def test_channels_of_one_circuit_alone_are_untouched_by_the_others(base, seeds, overlap):
    deltas = [tiny_delta(base, f"c{s}", seed=s, fraction=0.4, alpha=0.1 + s / 300) for s in seeds]
    whole = compose(deltas, overlap=overlap)
    for delta in deltas:
        others = [d.mask.channels for d in deltas if d is not delta]
        for layer, channels in delta.mask.channels.items():
            alone = tuple(c for c in channels if not any(c in o.get(layer, ()) for o in others))
            if alone:
                mask = Mask("neurons", 48, {layer: alone})
                assert same_bits(on(whole, mask, layer), on(delta, mask, layer))


def test_a_composition_is_saved_and_loaded_with_its_parts(three, tmp_path):
    whole = with_metrics(compose(three, overlap="mean"), {"benign_over_refusal": RATE})
    again = load_delta(save_delta(whole, tmp_path / "d"))
    assert same(again, whole)
    assert again.description.composition.overlap == "mean"
    assert again.description.metrics == {"benign_over_refusal": RATE}
    assert [c.alpha for c in again.description.components] == [0.37, 1.7, 2.9]
    assert subtract(again, "crime").description.metrics == {}  # measured with all three, so not for two


def test_a_checkpoint_goes_from_three_categories_to_two_and_back_to_the_base(tmp_path):
    base = saved_llama(tmp_path / "base", dtype=torch.bfloat16)
    whole = compose([tiny_delta(base, c, seed=i, fraction=0.4) for i, c in enumerate("abc")])
    edited_all = apply_to(base.name, whole, tmp_path / "abc")
    again = remove_from(edited_all, whole, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()
    less = subtract(whole, "b")
    apply_to(again, less, tmp_path / "ac")
    scratch = compose([tiny_delta(base, c, seed=i, fraction=0.4) for i, c in enumerate("abc") if c != "b"])
    apply_to(base.name, scratch, tmp_path / "scratch")
    assert (tmp_path / "ac" / "model.safetensors").read_bytes() == (tmp_path / "scratch" / "model.safetensors").read_bytes()
    card = (tmp_path / "abc" / "README.md").read_text()
    assert "edited to refuse: a, b, c" in card and "`largest`" in card


def test_a_composition_is_an_intervention_and_leaves_the_base(base, three):
    batch = batch_of(base, some_prompts())
    before = logits_of(base, batch)
    whole = compose(three)
    with whole.edit().apply(base, batch):
        assert not torch.equal(logits_of(base, batch), before)
        layer = next(iter(whole.mask.channels))
        weight = base.layers[layer].mlp.down_proj.weight
        assert same_bits(slice_of(weight, whole.mask, layer), whole.edited()[layer])
    assert torch.equal(logits_of(base, batch), before)


def test_what_cannot_be_composed_is_one_clear_error(backbone):
    delta = tiny_delta(backbone)
    with pytest.raises(CircuitError, match="nothing to compose"):
        compose([])
    with pytest.raises(CircuitError, match="crime is there more than once"):
        compose([delta, tiny_delta(backbone, seed=3)])
    with pytest.raises(CircuitError, match="belong to different bases, tiny-llama"):
        compose([delta, tiny_delta(tiny_backbone(seed=1), "hate")])
    with pytest.raises(CircuitError, match="one edits neurons of 48 in float32, the other outputs of 32"):
        compose([delta, tiny_delta(backbone, "hate", reading="outputs")])
    with pytest.raises(CircuitError, match="in float32, the other neurons of 48 in bfloat16"):
        compose([delta, tiny_delta(tiny_backbone(dtype=torch.bfloat16), "hate")])
    hate = tiny_delta(backbone, "hate")
    changed = replace(hate, base={layer: own + 1 for layer, own in hate.base.items()})
    with pytest.raises(CircuitError, match="different weights of their base in layer 1"):
        compose([delta, changed])
    with pytest.raises(CircuitError, match="no category 'health' in this delta; it holds crime, hate"):
        subtract(compose([delta, hate]), "health")
    with pytest.raises(CircuitError, match="'crime' is all there is"):
        subtract(delta, "crime")


def test_a_scale_weakens_every_category_alike_and_takes_away_figures_of_another_alpha(base, three):
    measured = [with_metrics(d, {"benign_over_refusal": RATE}) for d in three]
    whole, half = compose(measured), compose(measured, scale=0.5)
    assert [c.alpha for c in half.description.components] == [c.alpha / 2 for c in whole.description.components]
    assert whole.description.components[0].metrics and not any(c.metrics for c in half.description.components)
    assert half.alpha == 1.0
    keys = {
        tuple(line.edited_sha256 for line in d.description.layers) for d in (whole, half, compose(measured, overlap="sum"))
    }
    assert len(keys) == 3 and weights_sha256(whole) == weights_sha256(half)  # what tells their answers apart
    for layer, values in half.edited().items():  # as the composition at that alpha, but for one rounding
        torch.testing.assert_close(values.float(), whole.edited(0.5)[layer].float(), rtol=1e-2, atol=1e-3)
    assert same(subtract(half, "hate"), compose([d for d in measured if d.description.categories != ("hate",)], scale=0.5))
    with pytest.raises(CircuitError, match="alpha -"):
        compose(three, scale=-1.0)
