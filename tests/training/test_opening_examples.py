"""Prompts with drawn openings, the loss on them, and the loop that fine-tunes a whole model on them."""

from __future__ import annotations

import copy

import pytest
import torch

from paving.backbone import BackboneError, render_ids
from paving.training.fine_tune import fine_tune
from paving.training.opening_examples import Example, opening_examples
from paving.training.packing import answer_cross_entropy
from tiny_models import tiny_backbone

PROMPTS = ("w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w11 w12")
PHRASES = tuple(f"w{100 + i} w{110 + i} w{120 + i}" + " w130" * (i % 3) for i in range(10))
QUICK = {"epochs": 3, "batch_size": 2, "learning_rate": 1e-2, "weight_decay": 0.0, "seed": 0, "say": lambda _line: None}


def drawn(backbone, prompts=PROMPTS, **changes):
    return opening_examples(backbone, prompts, PHRASES, **{"seed": 0, "epoch": 0, **changes})


def test_each_prompt_gets_one_of_the_openings_and_no_end_of_turn(backbone):
    known = [backbone.tokenizer(p, add_special_tokens=False)["input_ids"] for p in PHRASES]
    examples = drawn(backbone)
    assert [e.prompt for e in examples] == [render_ids(backbone, p) for p in PROMPTS]
    assert all(e.answer in known for e in examples)


def test_openings_are_drawn_anew_each_epoch_and_fixed_by_seed_and_epoch(backbone):
    many = PROMPTS * 5
    assert drawn(backbone, many) == drawn(backbone, many)
    assert drawn(backbone, many, epoch=1) == drawn(backbone, many, epoch=1)
    runs = [drawn(backbone, many), drawn(backbone, many, epoch=1), drawn(backbone, many, seed=1)]
    assert all(a != b for i, a in enumerate(runs) for b in runs[:i])
    assert {tuple(e.answer) for e in drawn(backbone, PROMPTS * 50)} == {
        tuple(backbone.tokenizer(p, add_special_tokens=False)["input_ids"]) for p in PHRASES
    }


def test_a_prompt_that_leaves_no_room_for_its_opening_is_refused_by_its_place(backbone):
    with pytest.raises(BackboneError, match=r"prompt 1 \('w1 w1.*256"):
        drawn(backbone, ("w1", " ".join(["w1"] * 251)))


@pytest.mark.parametrize(("prompts", "phrases"), [((), PHRASES), (PROMPTS, ())])
def test_nothing_to_draw_from_is_said(backbone, prompts, phrases):
    with pytest.raises(ValueError, match="give no examples"):
        opening_examples(backbone, prompts, phrases, seed=0)


def test_the_loss_is_the_mean_over_answer_tokens_of_each_row_alone(any_backbone):
    rows = drawn(any_backbone)
    assert len({len(r.prompt) for r in rows}) > 1 and len({len(r.answer) for r in rows}) > 1
    total = 0.0
    for row in rows:
        ids = torch.tensor([row.prompt + row.answer])
        with torch.no_grad():
            log_probs = any_backbone.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        where = range(len(row.prompt) - 1, len(row.prompt) + len(row.answer) - 1)
        total -= sum(float(log_probs[i, token]) for i, token in zip(where, row.answer, strict=True))
    with torch.no_grad():
        loss = answer_cross_entropy(any_backbone, rows, packing=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = answer_cross_entropy(any_backbone, rows, packing=False)
            packed = answer_cross_entropy(any_backbone, rows[:2], packing=True)  # mask and queries of one dtype
    assert packed.isfinite()
    assert float(loss) == pytest.approx(total / sum(len(r.answer) for r in rows), rel=1e-4)
    assert float(rounded) == pytest.approx(float(loss), rel=0.05) and rounded != loss


def test_the_loss_reaches_the_weights():
    backbone = tiny_backbone()
    backbone.model.requires_grad_(True)
    answer_cross_entropy(backbone, drawn(backbone), packing=False).backward()
    assert all(bool(p.grad.any()) for p in backbone.layers[2].parameters())


# --- the loop -------------------------------------------------------------------------------------------------------


def tuned(backbone, **changes):
    model = copy.deepcopy(backbone.model)
    seen = []

    def examples(epoch):
        seen.append(epoch)
        return drawn(backbone, epoch=epoch)

    losses = fine_tune(backbone, model, examples, **{**QUICK, **changes})
    return model, losses, seen


def equal(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_fine_tuning_lowers_the_loss_of_a_copy_and_leaves_the_base(backbone):
    before = copy.deepcopy(backbone.model)
    model, losses, seen = tuned(backbone, epochs=6)
    assert seen == [0, 1, 2, 3, 4, 5] and len(losses) == 6
    assert losses[-1] < 0.7 * losses[0]
    assert equal(backbone.model, before) and not equal(model, before)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_fine_tuning_is_fixed_by_its_seed_and_leaves_the_callers_random_state(backbone):
    state = torch.get_rng_state()
    one, other = tuned(backbone), tuned(backbone)
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(one[0], other[0]) and one[1] == other[1]
    assert not equal(one[0], tuned(backbone, seed=1)[0])


def test_a_fine_tune_that_diverges_says_so(backbone):
    broken = copy.deepcopy(backbone.model)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        fine_tune(backbone, broken, lambda _epoch: [Example([1, 2], [3])], **QUICK)
