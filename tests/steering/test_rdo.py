"""GoR-RDO: a direction learned by gradient."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_refusals import REFUSAL, TARGET, holds_to_the_protocol, material, train_and_calibration

from paving.backbone import render_batch, render_ids
from paving.prompts.types import Bucket
from paving.steering.checks import SteeringError
from paving.steering.rdo import LearnedDirection, RDOConfig, descend, fit_rdo
from tiny_models import hooks_on, logits_of, some_prompts, tiny_backbone

INITIAL = 3 * torch.randn(32, generator=torch.Generator().manual_seed(4))
ALL = RDOConfig(steps=12, batch_size=6, micro_batch=4, learning_rate=0.05, check_every=4)  # every step sees all six rows
LAYER, ALPHA = 2, 4.0


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


def fitted(backbone, config=ALL, seed=0, **changes) -> LearnedDirection:
    arguments = {"initial": INITIAL, "layer": LAYER, "alpha": ALPHA, "config": config, **changes}
    return fit_rdo(backbone, material(seed), **arguments)


def test_the_loss_falls_on_what_is_trained_on_and_the_best_look_is_taken(backbone):
    seen = []
    found = fitted(backbone, ALL.model_copy(update={"steps": 20}), watch=lambda step, loss: seen.append((step, loss)))
    assert found.losses[-1].total < found.losses[0].total - 0.2
    assert seen == list(enumerate(found.losses, start=1))
    assert [step for step, _ in found.checks] == [0, *range(4, 4 * len(found.checks), 4)]
    assert found.best_step == min(found.checks, key=lambda c: c[1].total)[0]
    assert found.unit.shape == (32,) and found.unit.dtype == torch.float32 and not found.unit.requires_grad
    assert found.unit.norm().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("horizon", [8, 30])  # shorter than every row, and longer than all
def test_the_loss_is_that_of_a_model_with_the_direction_out_of_its_weights(backbone, horizon):
    """No hook and no padding: ablation as orthogonalised weights, addition as a bias, row by row."""
    r = (INITIAL / INITIAL.norm()).double()
    base = copy.deepcopy(backbone.model).double()
    ablated, added = copy.deepcopy(base), copy.deepcopy(base)
    with torch.no_grad():
        embedding = ablated.model.embed_tokens.weight
        embedding -= (embedding @ r)[:, None] * r
        for block in ablated.model.layers:
            for projection in (block.self_attn.o_proj, block.mlp.down_proj):
                projection.weight -= torch.outer(r, r @ projection.weight)
        added.model.layers[LAYER].mlp.down_proj.bias = torch.nn.Parameter(ALPHA * r)

    @torch.no_grad()
    def nll(model, p, answer):
        ids = render_ids(backbone, p.text)
        logits = model(torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1]
        return F.cross_entropy(logits, torch.tensor(answer))

    @torch.no_grad()
    def kl(p, answer):
        ids = torch.tensor([[*render_ids(backbone, p.text), *answer]])
        new, old = (m(ids).logits[0, -horizon:].log_softmax(-1) for m in (ablated, base))
        return (new.exp() * (new - old)).sum()

    found = fitted(backbone, ALL.model_copy(update={"steps": 1, "horizon": horizon}))
    for loss, split in ((found.losses[0], 0), (found.checks[0][1], 1)):
        edit, benign = (train_and_calibration(material(), b)[split] for b in (Bucket.EDIT, Bucket.BENIGN_KEEP))
        answers = material().answers
        expected = [
            torch.stack([nll(ablated, p, TARGET) for p in edit]).mean(),
            torch.stack([nll(added, p, REFUSAL) for p in benign]).mean(),
            torch.stack([kl(p, answers[p.id]) for p in benign]).mean(),
        ]
        assert [loss.ablation, loss.addition, loss.retain] == pytest.approx([e.item() for e in expected], rel=1e-4)
        assert loss.total == pytest.approx(loss.ablation + 0.2 * loss.addition + loss.retain)


def test_every_step_has_no_gradient_along_the_direction_and_leaves_it_of_length_one(backbone, monkeypatch):
    step, seen = torch.optim.AdamW.step, []

    def noted(self, *args):
        (r,) = self.param_groups[0]["params"]
        seen.append((r.norm().item(), (r.grad @ r).abs().item() / r.grad.norm().item()))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    fitted(backbone)
    assert len(seen) == ALL.steps
    assert all(length == pytest.approx(1, abs=1e-6) for length, _ in seen)
    assert max(along for _, along in seen) < 1e-5


def test_a_step_is_taken_on_the_sphere():
    r = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
    r.grad = torch.tensor([5.0, 2.0, -1.0])
    descend(r, torch.optim.SGD([r], lr=0.5))
    torch.testing.assert_close(r.detach(), F.normalize(torch.tensor([1.0, -1.0, 0.5]), dim=0))
    assert r.grad is None


def test_the_same_seed_gives_the_same_bits_and_another_another_order(backbone):
    config = ALL.model_copy(update={"steps": 4, "batch_size": 2, "check_every": 1})
    one, two, other = fitted(backbone, config), fitted(backbone, config), fitted(backbone, config, seed=1)
    assert torch.equal(one.unit, two.unit) and one.losses == two.losses and one.checks == two.checks
    assert one.losses != other.losses


def test_micro_batches_change_rounding_only(backbone):
    one = fitted(backbone, ALL.model_copy(update={"micro_batch": 6}))
    two = fitted(backbone, ALL.model_copy(update={"micro_batch": 1}))
    assert [loss.total for loss in one.losses] == pytest.approx([loss.total for loss in two.losses], rel=1e-3)


def test_the_model_is_left_frozen_without_gradients_and_without_hooks(backbone):
    batch = render_batch(backbone, some_prompts())
    before, state = logits_of(backbone, batch), copy.deepcopy(backbone.model.state_dict())
    with torch.no_grad():  # a caller's no_grad does not stop the training
        assert fitted(backbone, ALL.model_copy(update={"steps": 2})).losses
    assert torch.equal(logits_of(backbone, batch), before)
    assert all(torch.equal(v, state[k]) for k, v in backbone.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())
    assert hooks_on(backbone.model) == []


def test_a_search_that_does_not_get_better_slows_down_then_ends_with_what_it_began_with(backbone, monkeypatch):
    good = fitted(backbone).unit
    step, rates = torch.optim.AdamW.step, []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    wild = RDOConfig(steps=50, batch_size=6, learning_rate=20.0, check_every=1, patience=2, reductions=1)
    found = fitted(backbone, wild, initial=5 * good)
    assert rates == [20, 20, 2, 2] and len(found.checks) == 5
    assert found.best_step == 0
    torch.testing.assert_close(found.unit, good)


def test_a_direction_that_is_none_a_lost_loss_and_missing_answers_are_said(backbone):
    for initial, alpha in ((torch.zeros(32), 1.0), (torch.ones(31), 1.0), (torch.full((32,), torch.nan), 1.0)):
        with pytest.raises(SteeringError, match="begins at a direction"):
            fitted(backbone, initial=initial, alpha=alpha)
    with pytest.raises(SteeringError, match="alpha is 0"):
        fitted(backbone, alpha=0.0)
    with pytest.raises(FloatingPointError, match="at step 2"):
        fitted(backbone, ALL.model_copy(update={"learning_rate": float("inf")}))
    assert hooks_on(backbone.model) == []
    silent = replace(material(), answers={})
    with pytest.raises(SteeringError, match="has 0 and 0 of them"):
        fit_rdo(backbone, silent, initial=INITIAL, layer=LAYER, alpha=ALPHA)


def test_a_refusal_is_learned_up_to_its_first_full_stop(backbone, monkeypatch):
    """The published code cuts there. Token 112 is made to end a sentence."""
    decode = backbone.tokenizer.decode
    monkeypatch.setattr(type(backbone.tokenizer), "decode", lambda _self, ids: "so." if ids == [112] else decode(ids))
    config = ALL.model_copy(update={"steps": 1})
    cut = fitted(backbone, config)
    monkeypatch.undo()
    answers = {i: REFUSAL[:2] if a == REFUSAL else a for i, a in material().answers.items()}
    short = fit_rdo(backbone, replace(material(), answers=answers), initial=INITIAL, layer=LAYER, alpha=ALPHA, config=config)
    assert cut.losses[0].addition == short.losses[0].addition != fitted(backbone, config).losses[0].addition


def test_rows_are_edited_one_by_one(backbone):
    unit = INITIAL / INITIAL.norm()
    holds_to_the_protocol(backbone, LearnedDirection(unit, 0, (), ()).editor())
