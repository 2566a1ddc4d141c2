"""Fine-tuning of whole models on short answers: one loop for whoever needs another checkpoint of a base."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from paving.backbone import Backbone
from paving.training.opening_examples import Example
from paving.training.packing import answer_cross_entropy, check_packing, check_window

Say = Callable[[str], None]


def fine_tune(
    base: Backbone,
    model: PreTrainedModel,
    examples: Callable[[int], Sequence[Example]],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    say: Say,
    packing: bool = False,
) -> list[float]:
    """Train every weight of `model` (float32; bfloat16 autocast) on answer tokens, in place, and freeze it again.

    base      whose tokenizer and layout the model shares; not changed
    packing   a step's rows in one sequence (see paving.training.packing)
    examples  epoch, from 0 -> that epoch's examples, whose order is drawn here
    returns   mean loss of each epoch (nats). Order and result are fixed by the seed

    raises FloatingPointError if the loss is no longer finite
    """
    rng = random.Random(seed)
    student = replace(base, model=model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True)
    means = []
    model.requires_grad_(True).train()
    # Dropout, where a model has it, draws from torch's own generator; the caller's, on the CPU, is left where it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for epoch in range(epochs):
            rows = list(examples(epoch))
            order = rng.sample(rows, len(rows))
            if packing:
                check_window(base, order)
                if epoch == 0:
                    check_packing(base, order[:batch_size])
            losses = []
            for start in range(0, len(order), batch_size):
                with torch.autocast(base.device.type, dtype=torch.bfloat16):
                    loss = answer_cross_entropy(student, order[start : start + batch_size], packing=packing)
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"loss is {loss.item()} in epoch {epoch + 1}; lower the learning rate.")
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                losses.append(loss.item())
                step = start // batch_size + 1
                if step % 25 == 0:
                    say(f"epoch {epoch + 1}/{epochs} step {step}: loss {sum(losses[-25:]) / 25:.3f}")
            means.append(sum(losses) / len(losses))
    model.eval().requires_grad_(False)
    return means
