"""What the comparison of router heads rests on: its heads find what is there, its folds see no group twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from paving.prompts.types import Bucket, Prompt
from paving.traces.prompt_states import prompt_states
from paving.traces.store import TraceStore
from tiny_models import tiny_backbone


@pytest.fixture
def features(script):
    return script("routing_features")


@pytest.fixture
def heads(script):
    return script("gate_heads")


def prompts(n: int) -> list[Prompt]:
    return [
        Prompt(
            f"{side}{i}",
            f"{'w1 w2' if side == 'e' else 'w3'} w{10 + i} w{40 + 2 * i + (side == 'e')}",
            Bucket.EDIT if side == "e" else Bucket.HARMFUL_KEEP,
            group=f"g{i}",
        )
        for i in range(n)
        for side in "eh"
    ]


def planted(rng: np.random.Generator, n: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """One token in nine says which it is, and says that it does."""
    tokens = torch.from_numpy(rng.normal(size=(n, 9, 12)).astype(np.float32))
    y = np.arange(n) % 2 == 0
    for i in range(n):
        tokens[i, rng.integers(9)] = torch.tensor([6.0, 3.0 if y[i] else -3.0] + [0.0] * 10)
    return tokens, torch.ones(n, 9), y


def test_attention_finds_the_token_that_tells_where_the_mean_does_not(heads):
    rng = np.random.default_rng(0)
    (tokens, mask, y), (others, other_mask, truth) = planted(rng, 200), planted(rng, 200)
    attended = heads.attention(tokens, mask, y, np.ones(200), members=1, steps=200)(others, other_mask)
    mean = heads.linear(tokens.mean(1).numpy(), y, np.ones(200))(others.mean(1).numpy())
    right = [float(np.mean((scores > 0) == truth)) for scores in (attended, mean)]
    assert right[0] > right[1] + 0.03 and right[0] > 0.9


def test_a_row_of_attention_is_scored_as_it_is_alone(heads):
    tokens, mask, y = planted(np.random.default_rng(1), 40)
    score = heads.attention(tokens, mask, y, np.ones(40), members=2, steps=5)
    short, here = tokens[:1, :4], mask[:1, :4]
    padded = torch.cat([short, torch.full((1, 5, 12), 7.0)], dim=1)
    behind = torch.cat([here, torch.zeros(1, 5)], dim=1)
    assert score(padded, behind) == pytest.approx(score(short, here), abs=1e-5)


def test_hard_negatives_are_the_keeps_that_read_as_edits(heads):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(90, 3))
    y = np.arange(90) < 45
    x[y, 0] += 4
    x[45:55, 0] += 4  # ten keeps look like edits
    weights = heads.hard_negatives(heads.linear, x, y, np.ones(90), np.arange(90) % 5)
    hard = weights > weights[~y].min() * 2
    assert (weights[y] == 1).all() and weights[~y].sum() == pytest.approx(45), "keeps together weigh what they did"
    assert weights[hard].max() == pytest.approx(3 * weights[~y].min())
    assert hard.sum() == 15 and hard[45:55].mean() >= 0.9


def test_the_states_are_those_that_a_router_reads_and_the_words_are_the_users(heads, tmp_path):
    backbone = tiny_backbone()
    ours = prompts(4)
    parts, every = heads.read_states(backbone, ours, (1, 2), batch_size=3)
    theirs = prompt_states(backbone, TraceStore(tmp_path), ours)
    for p in ours:
        assert torch.allclose(parts[p.id]["last"], theirs[p.id].last[[1, 2]], atol=1e-5)
        assert torch.allclose(parts[p.id]["mean"], theirs[p.id].mean[[1, 2]], atol=1e-5)
        low, high = parts[p.id]["extremes"].chunk(2, dim=-1)[::-1]
        assert (low <= parts[p.id]["user"] + 1e-6).all() and (parts[p.id]["user"] <= high + 1e-6).all()
        assert every[p.id].shape[1:] == (2, backbone.d_model)


@pytest.fixture
def material(features):
    """Two blocks of states in which the first column tells both sides apart, on every prompt and pair."""
    rng = np.random.default_rng(3)
    ours = tuple(prompts(20))
    pairs = tuple(replace(p, id=f"pair/{p.id}", text=f"{p.text} indeed", group=f"pair {p.group}") for p in prompts(6))
    parts, every = {}, {}
    for p in (*ours, *pairs):
        tokens = torch.from_numpy(rng.normal(size=(5, 2, 8)).astype(np.float32))
        tokens[:, :, 0] += 2.0 if p.bucket is Bucket.EDIT else -2.0
        every[p.id] = tokens
        parts[p.id] = {"last": tokens[-1], "mean": tokens.mean(0)}
    return features.Material(ours, {"none": (), "kinds": pairs}, lambda _suffix: (parts, every), (3, 4), "these")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"pairs": "none"},
        {"head": "linear", "hard": True},
        {"head": "whitened"},
        {"head": "perceptron", "members": 2},
        {"head": "attention"},
        {"own": 0},
        {"blocks": ((3,), (3, 4))},
    ],
)
def test_every_kind_of_row_ranks_what_can_be_ranked(features, material, change):
    variant = replace(features.Variant(blocks=((3, 4),)), **change)
    shuffles = features.out_of_fold(variant, material)
    by_id = {p.id: p for p in material.prompts}
    assert len(shuffles) == features.SHUFFLES and all(set(s) == set(by_id) for s in shuffles)
    if variant.head == "whitened":  # as many components here as rows to whiten by: it ranks, not well
        assert features.mean_auc(shuffles, by_id) > 0.7
    else:
        assert features.mean_auc(shuffles, by_id) > 0.95 and features.opened_at(shuffles, by_id) > 0.6


def test_labels_without_meaning_rank_nothing(features, material):
    parts, every = material.states("")
    for p in material.prompts:
        for states in (parts[p.id]["last"], parts[p.id]["mean"]):
            states[:, 0] = 0.0
    blank = replace(material, pairs={"none": ()}, states=lambda _suffix: (parts, every))
    shuffles = features.out_of_fold(features.Variant(pairs="none", blocks=((3, 4),)), blank)
    assert 0.2 < features.mean_auc(shuffles, {p.id: p for p in material.prompts}) < 0.8


def test_a_row_is_kept_until_its_definition_or_the_prompts_change(features, material, tmp_path, monkeypatch):
    name = "no pairs"
    monkeypatch.setitem(features.VARIANTS, name, replace(features.Variant(blocks=((3, 4),)), pairs="none"))
    kept = tmp_path / "rows.json"
    first = features.found(kept, name, material)
    monkeypatch.setattr(features, "out_of_fold", lambda *_: pytest.fail("found again"))
    assert features.found(kept, name, material) == first
    with pytest.raises(pytest.fail.Exception):
        features.found(kept, name, replace(material, made_of="others"))
    monkeypatch.setitem(features.VARIANTS, name, replace(features.VARIANTS[name], head="linear"))
    with pytest.raises(pytest.fail.Exception):
        features.found(kept, name, material)


def test_a_difference_has_its_interval_and_the_first_row_none(features, material):
    by_id = {p.id: p for p in material.prompts}
    good = [{p.id: float(p.bucket is Bucket.EDIT) + 0.01 * i for i, p in enumerate(material.prompts)}]
    rng = np.random.default_rng(4)
    bad = [{p.id: float(rng.normal()) for p in material.prompts}]
    names = list(features.VARIANTS)[:2]
    seeds = [
        {name: features.Found(variant={}, made_of="", scores=s) for name, s in zip(names, (good, bad), strict=True)}
        for _ in range(2)
    ]
    rows = [features.summary(name, seeds, by_id) for name in names]
    assert rows[0]["interval"] is None and rows[0]["auc"] == [1.0, 1.0]
    assert features.won(bad, by_id).mean() == pytest.approx(features.mean_auc(bad, by_id))
    low, high = rows[1]["interval"]
    assert low < rows[1]["difference"] < high < 0
    assert "| no pairs | " in features.as_text(rows) and "1.000 (1.000, 1.000)" in features.as_text(rows)
