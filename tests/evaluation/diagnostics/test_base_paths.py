"""Off the base's own path: sizes are those of what was added, a closed gate adds nothing, one base pass serves all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paving.backbone import checked_ids
from paving.backbone.hooks import record_residuals
from paving.controller import AlwaysOpen, Closed
from paving.evaluation.diagnostics.base_path import base_paths, relative_size, stream_size
from paving.evaluation.diagnostics.condense import layer_norms, path_record
from paving.evaluation.diagnostics.forced import ForcedPrompts
from paving.evaluation.statistics import wilson
from paving.prompts.types import Bucket
from tiny_models import LATE, lively, prompt, tiny_backbone

LAYERS = range(6)


@pytest.fixture
def keeps():
    return [prompt("a", [1, 2, 3], Bucket.BENIGN_KEEP), prompt("b", [4, 5, 6, 7, 8], Bucket.HARMFUL_KEEP)]


@pytest.fixture
def continuations(backbone):
    words = backbone.tokenizer.convert_tokens_to_ids([f"w{i}" for i in (90, 91, 92, 93)])
    return {"a": tuple(words), "b": tuple(words[:2])}


def test_a_cached_prompt_gives_the_states_and_losses_of_a_whole_pass(backbone, keeps, continuations):
    ids = [checked_ids(backbone, p) for p in keeps]
    forced = [continuations[p.id] for p in keeps]
    batch = ForcedPrompts(backbone, keeps, ids)
    first, again = batch.run(forced, LAYERS), batch.run(forced, LAYERS)
    assert torch.equal(first.states, again.states), "a pass must not leave its columns in the next one's cache"
    for i, (row, tokens) in enumerate(zip(ids, forced, strict=True)):
        whole = torch.tensor([[*row, *tokens]])
        with torch.no_grad(), record_residuals(backbone, LAYERS) as seen:
            log_probs = backbone.model(input_ids=whole).logits.log_softmax(-1)[0]
        last = len(row) - 1
        for layer in LAYERS:
            expected = seen[layer][0, last : last + len(tokens)]
            torch.testing.assert_close(first.states[i, layer, : len(tokens)], expected, atol=1e-4, rtol=1e-4)
        nll = -np.mean([log_probs[last + t, token].item() for t, token in enumerate(tokens)])
        assert first.nll[i] == pytest.approx(nll, abs=1e-4)


def test_a_closed_gate_moves_nothing_and_an_open_one_only_from_the_first_edited_layer_on(backbone, keeps, continuations):
    variants = [lively(backbone, policy=Closed()), lively(backbone, policy=AlwaysOpen())]
    closed, opened = base_paths(backbone, keeps, continuations, variants, LAYERS)
    for p in keeps:
        assert closed[p.id].rms == 0.0 and closed[p.id].gate == 0.0
        assert closed[p.id].nll_edited == closed[p.id].nll_base
        np.testing.assert_array_equal(closed[p.id].edited, closed[p.id].base)
        first_edited = min(variants[1].config.edit_layers)
        assert (opened[p.id].moved[:first_edited] == 0).all() and (opened[p.id].moved[first_edited:] > 0).all()
        assert opened[p.id].nll_edited != opened[p.id].nll_base and opened[p.id].gate == 1.0
        np.testing.assert_array_equal(opened[p.id].base, closed[p.id].base)
        assert opened[p.id].untouched().rms == 0.0 and opened[p.id].untouched().nll_edited == closed[p.id].nll_edited
        np.testing.assert_array_equal(opened[p.id].untouched().edited, closed[p.id].edited)


def test_padding_counts_in_no_prompts_size(backbone, keeps, continuations):
    opened = lively(backbone, policy=AlwaysOpen())
    (together,) = base_paths(backbone, keeps, continuations, [opened], LAYERS)
    for p in keeps:
        (alone,) = base_paths(backbone, [p], continuations, [opened], LAYERS)
        np.testing.assert_allclose(together[p.id].moved, alone[p.id].moved, rtol=1e-3)
        np.testing.assert_allclose(together[p.id].base, alone[p.id].base, rtol=1e-4)


def test_sizes_of_a_bucket_are_root_mean_squares_over_its_prompts(backbone, keeps, continuations):
    variants = [lively(backbone, policy=AlwaysOpen()), lively(backbone, policy=Closed())]
    opened, closed = (list(p.values()) for p in base_paths(backbone, keeps, continuations, variants, LAYERS))
    np.testing.assert_allclose(stream_size([np.array([3.0]), np.array([4.0])]), [np.sqrt(12.5)])
    moved = np.sqrt((opened[0].moved ** 2 + opened[1].moved ** 2) / 2)
    base = np.sqrt((opened[0].base ** 2 + opened[1].base ** 2) / 2)
    np.testing.assert_allclose(relative_size(opened), moved / base)
    records = layer_norms("edit", LAYERS, opened, closed)
    assert [r.layer for r in records] == list(LAYERS)
    assert all(r.share_deployed == 0.0 for r in records) and records[-1].share_open == pytest.approx((moved / base)[-1])


def test_a_bucket_without_prompts_has_no_size():
    (record,) = layer_norms("edit", (3,), [], [])
    assert record.base is None and record.edited is None and record.share_open is None and record.share_deployed is None


def test_late_routing_cannot_start_on_a_cached_prompt_by_itself(keeps, continuations):
    """The states of the cached columns are gone; `Decided` is the way, and the error says why."""
    backbone = tiny_backbone()
    with pytest.raises(ValueError, match="need the whole prompt at once"):
        base_paths(backbone, keeps, continuations, [lively(backbone, LATE, policy=AlwaysOpen())], LAYERS)


def test_closed_gates_count_as_the_zero_they_are(backbone, keeps, continuations):
    (paths,) = base_paths(backbone, keeps[:1], continuations, [lively(backbone, policy=AlwaysOpen())], LAYERS)
    record = path_record(paths.values(), 3, active=wilson(1, 4), blocked=None)
    assert record.path_rms.n == 4 and record.path_rms.mean == pytest.approx(paths["a"].rms / 4)
    assert record.nll_delta.mean == pytest.approx((paths["a"].nll_edited - paths["a"].nll_base) / 4)
