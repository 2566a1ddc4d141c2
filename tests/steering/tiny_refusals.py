"""Fitting material for tiny models, whose words are w0 to w189 and mean nothing, and what every editor has to hold to."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from paving.backbone import Backbone, render_batch, render_ids
from paving.generation import Decoding, generate
from paving.prompts.types import Bucket, Prompt, SplitName, Splits
from paving.steering.material import Material
from paving.steering.routing import Global, Labelled
from paving.steering.steered import Editor, Steered
from tiny_models import hooks_on, logits_of, prompt

REFUSAL, TARGET = (110, 111, 112, 113), (150, 151, 152, 2)
FIRST_WORD = {Bucket.EDIT: 1, Bucket.BENIGN_KEEP: 60, Bucket.HARMFUL_KEEP: 120}


def material(seed: int = 0) -> Material:
    """Six prompts a bucket to train on, four to calibrate on, 5 to 15 words. Every edit prompt gets one refusal, and one
    target; harmful keeps come from two sources. Benign prompts get answers of 2 to 5 tokens."""
    train, calibration = (
        tuple(_prompt(name, bucket, i) for bucket in Bucket for i in range(n)) for name, n in (("t", 6), ("c", 4))
    )
    answers = {
        p.id: REFUSAL if p.bucket is Bucket.EDIT else tuple(range(70, 72 + i % 4)) for i, p in enumerate(train + calibration)
    }
    targets = {p.id: TARGET for p in train + calibration if p.bucket is Bucket.EDIT}
    return Material(Splits(train, calibration, ()), targets, answers, seed)


def _prompt(split: str, bucket: Bucket, i: int) -> Prompt:
    first = FIRST_WORD[bucket] + (30 if split == "c" else 0)
    words = [FIRST_WORD[bucket], *range(first + i, first + i + 4 + 2 * (i % 4))]
    return replace(prompt(f"{split}-{bucket.value}-{i}", words, bucket), source="abc"[i % 2])


@torch.no_grad()
def last_states(backbone: Backbone, prompts, position: int = -1) -> torch.Tensor:
    """(n, n_layers, d_model) float64, prompt by prompt, by transformers' own recorder; the last layer before its norm.

    For layers before the last only: transformers gives the last one after the model's final norm.
    """
    model, rows = copy.deepcopy(backbone.model), []  # that recorder installs hooks, and they stay
    for p in prompts:
        ids = torch.tensor([render_ids(backbone, p.text)])
        states = model(ids, output_hidden_states=True).hidden_states[1:]
        rows.append(torch.stack([s[0, position] for s in states]).double())
    return torch.stack(rows)


def train_and_calibration(found: Material, bucket: Bucket) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    return found.of(SplitName.TRAIN, bucket), found.of(SplitName.CALIBRATION, bucket)


def steered(backbone: Backbone, editor: Editor, routing=None, scale: float = 1.0) -> Steered:
    return Steered("method", editor, routing or Global(), scale, backbone.name, backbone.fingerprint)


def holds_to_the_protocol(backbone: Backbone, editor: Editor, scale: float = 1.0) -> None:
    """Closed rows keep their bits, each row is edited as it is alone, and the model is left as it was."""
    prompts = [_prompt("t", bucket, i) for i in range(3) for bucket in Bucket]
    batch = render_batch(backbone, prompts)
    base = logits_of(backbone, batch)
    rows = [i for i, p in enumerate(prompts) if p.bucket is Bucket.EDIT]
    with steered(backbone, editor, Labelled(), scale).apply(backbone, batch):
        edited = logits_of(backbone, batch)
    for i in range(len(prompts)):
        assert torch.equal(edited[i], base[i]) == (i not in rows)
    assert torch.equal(logits_of(backbone, batch), base) and hooks_on(backbone.model) == []

    strength = torch.linspace(0, scale, len(prompts))
    with editor.editing(backbone, batch, strength):
        together = logits_of(backbone, batch)
    for i, p in enumerate(prompts):
        alone = render_batch(backbone, [p])
        with editor.editing(backbone, alone, strength[i : i + 1]):
            torch.testing.assert_close(together[i, -alone.width :], logits_of(backbone, alone)[0], atol=2e-4, rtol=1e-4)

    short = Decoding(max_new_tokens=5)
    method = steered(backbone, editor, scale=scale)
    done = generate(backbone, prompts, method, short)
    assert [c.response for c in done] == [generate(backbone, [p], method, short)[0].response for p in prompts]
