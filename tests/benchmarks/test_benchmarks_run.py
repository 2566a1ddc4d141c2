"""The timing scripts' pure parts: ratios, floors, and what they say when a comparator is missing. No time is asserted."""

from __future__ import annotations

import builtins
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def size(script):
    """A made-up model: 100 weights a token, 20 of them the head's."""
    paired = script("paired")
    return paired.ModelSize(n_layers=4, d_model=4, n_heads=2, n_kv_heads=1, head_dim=2, linear=100, head=20, item_bytes=2)


def test_ratios_are_paired_by_round_before_the_median_is_taken(script):
    paired = script("paired")
    # The machine was ten times slower in round 2; the ratio of medians would be 2.2, the paired one is not moved.
    ratio = paired.ratio_over_rounds([1.1, 22.0, 1.0], [1.0, 10.0, 1.0])
    assert (ratio.median, ratio.least, ratio.greatest, ratio.n) == (1.1, 1.0, 2.2, 3)


@pytest.mark.parametrize("times, reference", [([], []), ([1.0], [1.0, 2.0])])
def test_ratios_without_matching_rounds_are_refused(script, times, reference):
    with pytest.raises(ValueError, match="same rounds"):
        script("paired").ratio_over_rounds(times, reference)


def test_every_variant_runs_once_a_round_and_each_comes_first_in_turn(script):
    names = ["plain", "closed", "open"]
    rounds = list(script("paired").rotated_rounds(names, 3))
    assert all(sorted(r) == sorted(names) for r in rounds)
    assert sorted(r[0] for r in rounds) == sorted(names)


def test_a_models_size_counts_a_tied_head_once_and_no_embedding_look_up(script, backbone):
    size = script("paired").model_size(backbone)
    linear = [m for m in backbone.model.modules() if isinstance(m, torch.nn.Linear)]
    assert size.linear == sum(m.weight.numel() for m in linear)
    assert size.head == backbone.d_model * backbone.model.get_output_embeddings().weight.shape[0]
    assert size.n_layers == backbone.n_layers and size.head < size.linear


def test_a_variant_pays_for_its_set_up_in_the_ratio(script):
    bench = script("decode_overhead")
    plain = [bench.Call(whole=5.0, steps=4.0)]
    # Steps as fast as the plain model's, 0.4 s spent before the first token: 10 % of decoding.
    assert bench.charged([bench.Call(whole=5.4, steps=4.0)], plain).median == pytest.approx(1.1)
    assert bench.charged(plain, plain).median == 1.0


def test_a_decode_floor_counts_weights_once_a_batch_and_operations_once_a_row(script, size):
    floors = script("decode_overhead").floors
    one = floors(size, {"plain": 0, "open": 10}, n_rows=1, context=5)
    many = floors(size, {"plain": 0, "open": 10}, n_rows=16, context=5)
    assert one["plain"].operations == one["plain"].bytes == 1.0
    attention = 4 * 4 * 2 * 2 * 5
    assert one["open"].operations == many["open"].operations == pytest.approx(1 + 20 / (200 + attention))
    kv = 2 * 4 * 1 * 2 * 2  # bytes a column
    assert one["open"].bytes == pytest.approx(1 + 20 / (200 + 5 * kv))
    assert many["open"].bytes == pytest.approx(1 + 20 / (200 + 16 * 5 * kv))


def test_a_training_floor_grows_with_the_prompt_only_where_the_prompt_is_run(script, size):
    bench = script("train_step")
    experts = bench.ExpertsSize(weights=10, first_layer=1)
    short, long = (bench.floors(size, experts, length, horizon=12, n_rows=8) for length in (33, 1025))
    assert long["whole"].operations > 10 * short["whole"].operations
    # The cached step runs the same positions; only what these attend to, and the KV that is read, is longer.
    seen = 8 * 12 * 992 * 4 * 4 * 2 * 2 * (1 + 2 * 0.5)
    assert long["cached"].operations - short["cached"].operations == pytest.approx(seen)
    assert long["whole"].bytes == short["whole"].bytes
    assert long["cached"].bytes > short["cached"].bytes


def test_on_a_prompt_of_one_token_both_ways_cost_the_same(script, size):
    floors = script("train_step").floors(size, script("train_step").ExpertsSize(10, 1), 1, horizon=12, n_rows=2)
    assert floors["cached"] == floors["whole"]


def test_losses_are_compared_absolutely_and_relatively(script):
    apart = script("train_step").difference(2.0, 4.0)
    assert (apart["absolute"], apart["relative"]) == (2.0, 0.5)


def test_the_whole_prompt_way_edits_the_last_columns_only(script):
    bench = script("train_step")
    experts = SimpleNamespace(edits=lambda strength, dtype: {3: lambda resid: resid + 1})
    edit = bench.LastColumns(experts, n_columns=2).edits(None, None)[3]
    assert edit(torch.zeros(1, 5, 1)).flatten().tolist() == [0, 0, 0, 1, 1]


def test_both_ways_of_a_training_step_give_one_loss_and_one_gradient(script, backbone):
    same = script("train_step").compared(backbone, 9, SimpleNamespace(rows=[2, 1, 1], horizon=4))
    assert same["absolute"] <= 1e-4 and same["gradient_relative"] <= 1e-3
    assert same["whole"] > 0


def test_a_missing_comparator_stops_the_run_and_names_the_install(script, monkeypatch, capsys):
    bench = script("decode_overhead")
    really = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name == "peft":
            raise ImportError(name)
        return really(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    if "peft" not in bench.missing_comparators():
        pytest.fail("the patched import did not hide peft")
    assert bench.main(["--quick"]) == 2
    told = capsys.readouterr().err
    assert "peft" in told and "pip install 'paving[bench]'" in told
