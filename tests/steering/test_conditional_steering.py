"""CAST: the condition, how it is searched for, and that each row has its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sklearn.metrics import f1_score
from tiny_steering import OPENINGS, PAIRS, behaviour

from paving.generation import Decoding, generate
from paving.intervention import Identity
from paving.prompts.types import Bucket
from paving.steering import (
    ActivationSteering,
    Condition,
    ConditionalSteering,
    ConditionConfig,
    SteeringError,
    condition,
    fit_cast,
    fit_condition,
)
from paving.steering.condition import best_split, similarity
from tiny_models import HIDDEN, LAYERS, batch_of, decode, hooks_on, logits_of, prompt, some_prompts, tiny_backbone

STRONG = 6.0


@pytest.fixture
def mixed(any_backbone):
    return batch_of(any_backbone, some_prompts()[:4])


def halving(backbone, batch, layer=1, side=">") -> Condition:
    """A random condition that about half the rows of this batch meet, none of them narrowly."""
    vector = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1))
    values = Condition(layer, vector, 0.0, ">", 1.0).margins(backbone, batch).sort().values
    middle = len(values) // 2
    return Condition(layer, vector, float(values[middle - 1] + values[middle]) / 2, side, 1.0)


def cast(backbone, batch, *, layer=1, side=">", strength=STRONG, **changes) -> ConditionalSteering:
    return ConditionalSteering(behaviour(backbone, **changes), halving(backbone, batch, layer, side), strength)


def gates(intervention, backbone, batch) -> list[float]:
    with intervention.apply(backbone, batch) as applied:
        return [row.gate for row in applied.rows()]


# --- the condition --------------------------------------------------------------------------------------------------


def test_the_similarity_is_the_papers_formula_and_blind_to_the_vectors_sign():
    generator = torch.Generator().manual_seed(0)
    states, c = torch.randn((5, 8), generator=generator), torch.randn(8, generator=generator)
    projector = torch.outer(c, c) / c.dot(c)
    found = similarity(states, c)
    for h, value in zip(states, found, strict=True):
        p = torch.tanh(projector @ h)
        assert float(value) == pytest.approx(float(h.dot(p) / (h.norm() * p.norm())), abs=1e-6)
    torch.testing.assert_close(similarity(states, -c), found)


@pytest.mark.parametrize("seed", range(6))
def test_no_threshold_of_a_fine_grid_has_a_better_f1(seed):
    generator = torch.Generator().manual_seed(seed)
    positive = torch.randn(15, generator=generator) * 0.3 + (0.4 if seed % 2 else -0.4)
    negative = torch.randn(12, generator=generator) * 0.3
    negative[:2] = positive[:2]  # equal similarities on both sides
    found = best_split(positive, negative)
    values = torch.cat([positive, negative])

    def f1(threshold, side):
        met = values > threshold if side == ">" else values < threshold
        return 2 * int(met[:15].sum()) / (int(met.sum()) + 15)

    assert found.f1 == pytest.approx(f1(found.threshold, found.side))
    within = torch.linspace(float(values.min()) + 1e-4, float(values.max()) - 1e-4, 400)
    assert found.f1 >= max(f1(float(t), side) for t in within for side in "<>") - 1e-9


def test_among_equals_the_threshold_lies_in_the_widest_gap():
    found = best_split(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0]))
    assert (found.f1, found.threshold, found.side) == (1.0, 2.0, ">")
    assert found.room == pytest.approx(0.5)
    assert best_split(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 4.0])).side == "<"


def test_prompts_of_one_similarity_cannot_be_told_apart():
    with pytest.raises(SteeringError, match="no threshold"):
        best_split(torch.tensor([0.5, 0.5]), torch.tensor([0.5]))


@pytest.mark.parametrize("planted_layer", [2, 4])
def test_the_search_finds_the_one_layer_that_separates(backbone, monkeypatch, planted_layer):
    """Every other layer holds noise; in the planted one, harmful states lie along an axis that benign ones lack."""
    n = len(PAIRS)

    def states(_backbone, rows, _tails, layers, **_options):
        found = 0.3 * torch.randn((2 * n, len(layers), HIDDEN), generator=torch.Generator().manual_seed(2))
        found[:, layers.index(planted_layer), 7] = torch.tensor([4.0] * n + [0.1] * n)
        assert len(rows) == 2 * n
        return found

    monkeypatch.setattr(condition, "tail_means", states)
    found = fit_condition(backbone, PAIRS)
    assert (found.layer, found.side, found.f1) == (planted_layer, ">", 1.0)
    assert int(found.vector.abs().argmax()) == 7


def test_all_layers_but_the_first_are_searched_unless_named(backbone, monkeypatch):
    asked = []

    def states(_backbone, rows, _tails, layers, **_options):
        asked.append(layers)
        return torch.randn((len(rows), len(layers), HIDDEN), generator=torch.Generator().manual_seed(2))

    monkeypatch.setattr(condition, "tail_means", states)
    fit_condition(backbone, PAIRS)
    fit_condition(backbone, PAIRS, ConditionConfig(layers=(3,)))
    assert asked == [tuple(range(1, LAYERS)), (3,)]


def test_a_fitted_condition_opens_on_new_prompts_of_the_category_alone(backbone):
    found = fit_condition(backbone, PAIRS[:8])
    assert found.f1 == 1.0
    new = [prompt(f"{side}-{i}", [int(w[1:]) for w in text.split()], bucket)
           for i, pair in enumerate(PAIRS[8:])
           for side, text, bucket in zip("hb", pair, (Bucket.HARMFUL_KEEP, Bucket.BENIGN_KEEP), strict=True)]  # fmt: skip
    opened = found.margins(backbone, batch_of(backbone, new)) > 0
    assert opened.tolist() == [p.bucket == Bucket.HARMFUL_KEEP for p in new]


def test_a_margin_is_the_fitted_similarity_read_from_the_prompt_alone(backbone):
    """Fitting and applying read the same states: the margins of the training pairs give the F1 that was found."""
    found = fit_condition(backbone, PAIRS, ConditionConfig(layers=(2,)))
    both = [text for side in zip(*PAIRS, strict=True) for text in side]
    rows = [prompt(str(i), [int(w[1:]) for w in text.split()], Bucket.EDIT) for i, text in enumerate(both)]
    met = found.margins(backbone, batch_of(backbone, rows)) > 0
    truth = [1] * len(PAIRS) + [0] * len(PAIRS)
    assert f1_score(truth, met.int()) == pytest.approx(found.f1)


def test_no_pairs_is_said(backbone):
    with pytest.raises(SteeringError, match="none were given"):
        fit_condition(backbone, [])


# --- the intervention -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 5], ids=["below the edits", "above the edits"])
@pytest.mark.parametrize("side", ["<", ">"])
def test_rows_that_miss_the_condition_are_the_bases_bits_beside_rows_that_are_steered(any_backbone, mixed, layer, side):
    steered = cast(any_backbone, mixed, layer=layer, side=side)
    met = torch.tensor(gates(steered, any_backbone, mixed)) > 0
    assert met.sum() == 2
    base = logits_of(any_backbone, mixed)
    with steered.apply(any_backbone, mixed):
        edited = logits_of(any_backbone, mixed)
    with ActivationSteering(steered.behaviour, STRONG).apply(any_backbone, mixed):
        everywhere = logits_of(any_backbone, mixed)
    real = mixed.attention_mask.bool()
    assert torch.equal(edited[~met][real[~met]], base[~met][real[~met]])
    torch.testing.assert_close(edited[met][real[met]], everywhere[met][real[met]])
    assert bool(((edited - base)[met][:, -1].abs().amax(-1) > 1e-2).all())


@pytest.mark.parametrize(("layer", "positions"), [(1, "all"), (5, "answer")])
def test_each_row_of_a_batch_is_decided_and_answered_as_it_is_alone(any_backbone, layer, positions):
    prompts = some_prompts()
    batch = batch_of(any_backbone, prompts)
    steered = cast(any_backbone, batch, layer=layer, positions=positions)
    short = Decoding(max_new_tokens=6)
    together = generate(any_backbone, prompts, steered, short)
    alone = generate(any_backbone, prompts, steered, short, batch_size=1)
    assert len({len(p.text) for p in prompts}) > 4 and {c.gate for c in together} == {0.0, 1.0}
    assert [c.gate for c in together] == [c.gate for c in alone]
    assert [c.response for c in together] == [c.response for c in alone]
    assert [c.logit for c in together] == pytest.approx([c.logit for c in alone], abs=1e-5)
    base = generate(any_backbone, prompts, Identity(), short)
    assert all(c.response == b.response for c, b in zip(together, base, strict=True) if c.gate == 0)
    assert any(c.response != b.response for c, b in zip(together, base, strict=True) if c.gate == 1)


def test_the_decision_is_that_of_the_unedited_prompt_whatever_the_strength(backbone, batch):
    steered = cast(backbone, batch, layer=5)
    margins = []
    for strength in (STRONG, 100.0, 0.0):
        with replace(steered, strength=strength).apply(backbone, batch) as applied:
            logits_of(backbone, batch)
            margins.append([row.logit for row in applied.rows()])
    assert margins[0] == margins[1] == margins[2]


@pytest.mark.parametrize("change", [{"strength": 0.0}, {"threshold": 2.0}], ids=["strength 0", "met by none"])
def test_a_batch_that_is_left_alone_has_the_bases_bits_and_no_hook(backbone, batch, change):
    steered = cast(backbone, batch)
    if "threshold" in change:
        steered = replace(steered, condition=replace(steered.condition, **change))
    else:
        steered = replace(steered, **change)
    base = logits_of(backbone, batch)
    with steered.apply(backbone, batch) as applied:
        assert hooks_on(backbone.model) == []
        assert torch.equal(logits_of(backbone, batch), base)
    assert [row.gate for row in applied.rows()] == [0.0] * len(batch)


def test_nothing_is_remembered_from_one_batch_to_the_next(backbone):
    prompts = some_prompts()
    batch = batch_of(backbone, prompts)
    steered = cast(backbone, batch)
    first = gates(steered, backbone, batch)
    assert gates(steered, backbone, batch_of(backbone, prompts[::-1])) == first[::-1]
    assert gates(steered, backbone, batch) == first


def test_leaving_restores_the_model_also_after_an_error(backbone, batch):
    before = logits_of(backbone, batch)
    with pytest.raises(KeyError), cast(backbone, batch).apply(backbone, batch):
        assert hooks_on(backbone.model)
        raise KeyError
    assert hooks_on(backbone.model) == []
    assert torch.equal(logits_of(backbone, batch), before)


def test_no_label_is_read(backbone, batch):
    steered, found = cast(backbone, batch), []
    for bucket in (batch.bucket, (*batch.bucket[1:], batch.bucket[0]), (None,) * len(batch)):
        labelled = replace(batch, bucket=bucket)
        with steered.apply(backbone, labelled) as applied:
            found.append((decode(backbone.model, labelled), applied.rows()))
    assert all(torch.equal(found[0][0], text) and rows == found[0][1] for text, rows in found[1:])


def test_several_samples_of_a_prompt_follow_its_row(backbone, batch):
    steered = cast(backbone, batch)
    met = torch.tensor(gates(steered, backbone, batch)) > 0
    options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": True, "num_return_sequences": 2}
    base = decode(backbone.model, batch, **options).logits[0]
    with steered.apply(backbone, batch):
        edited = decode(backbone.model, batch, **options).logits[0]
    same = (edited == base).all(-1)
    assert same.tolist() == (~met).repeat_interleave(2).tolist()


def test_the_whole_method_is_fitted_from_pairs_and_openings(backbone):
    fitted = fit_cast(backbone, PAIRS, OPENINGS)
    rows = [prompt(str(i), [int(w[1:]) for w in text.split()], Bucket.EDIT) for i, text in enumerate(PAIRS[0])]
    assert gates(fitted, backbone, batch_of(backbone, rows)) == [1.0, 0.0]
    again = fit_cast(backbone, PAIRS, OPENINGS, fitted.behaviour)
    assert again.behaviour is fitted.behaviour
    assert torch.equal(again.condition.vector, fitted.condition.vector)
    with pytest.raises(ValueError, match="the behaviour was fitted on"):
        fit_cast(tiny_backbone(seed=1), PAIRS, OPENINGS, fitted.behaviour)
