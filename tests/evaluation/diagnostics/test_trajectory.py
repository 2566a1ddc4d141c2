"""Alignment of the edit's displacement: checked against a displacement made by hand."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from paving.backbone.hooks import edit_residuals
from paving.controller import AlwaysOpen, Closed
from paving.evaluation.diagnostics.base_path import base_paths
from paving.evaluation.diagnostics.trajectory import alignments
from paving.intervention import RowState
from paving.prompts.types import Bucket
from paving.traces.targets import EditTarget
from tiny_models import lively, prompt

LAYERS = (1, 3, 5)


@pytest.fixture
def edits():
    return [prompt("a", [1, 2, 3], Bucket.EDIT), prompt("b", [4, 5, 6, 7, 8], Bucket.EDIT)]


@pytest.fixture
def targets(backbone, edits):
    continuation = tuple(backbone.tokenizer.convert_tokens_to_ids([f"w{i}" for i in (30, 31, 32, 33, 34)]))
    teacher = tuple(backbone.tokenizer.convert_tokens_to_ids([f"w{i}" for i in (50, 51, 52)]))
    return {p.id: EditTarget(continuation[: 5 - i], continuation[:2], teacher, "own") for i, p in enumerate(edits)}


@pytest.fixture
def refusals(backbone, edits):
    tokens = tuple(backbone.tokenizer.convert_tokens_to_ids([f"w{i}" for i in (90, 91, 92, 93)]))
    return {p.id: tokens for p in edits}


@dataclass(frozen=True)
class Shift:
    """Adds a constant vector at one layer, everywhere."""

    vector: torch.Tensor
    layer: int
    name: str = "shift"

    @contextmanager
    def apply(self, backbone, batch, *, start=0):
        outer = self

        class Rows:
            def rows(self):
                return (RowState(gate=1.0),) * len(batch)

        with edit_residuals(backbone, {self.layer: lambda resid: resid + outer.vector}):
            yield Rows()


def path_rms(backbone, prompts, continuations, intervention, layers):
    (paths,) = base_paths(backbone, prompts, continuations, [intervention], layers)
    return {i: p.rms for i, p in paths.items()}


def test_an_intervention_that_does_nothing_has_no_direction(backbone, edits, targets, refusals):
    closed = lively(backbone, policy=Closed())
    for found in alignments(backbone, edits, targets, refusals, closed, LAYERS):
        assert np.isnan(found.edit).all() and np.isnan(found.refusal_whole)
        assert found.nll_edited == found.nll_base and found.gate == 0.0
    assert path_rms(backbone, edits, refusals, closed, LAYERS) == {"a": 0.0, "b": 0.0}


def test_shapes_follow_layers_and_the_shorter_continuation(backbone, edits, targets, refusals):
    first, second = alignments(backbone, edits, targets, refusals, Shift(torch.ones(backbone.d_model), 1), LAYERS)
    assert first.edit.shape == first.refusal.shape == (3, 3)  # min(5, 4) tokens, the first left out
    assert second.edit.shape == (3, 3)
    assert np.isfinite(first.edit).all() and (np.abs(first.edit) <= 1 + 1e-5).all()


def test_a_shift_of_the_last_layer_moves_that_layer_alone_and_by_its_own_length(backbone, edits, refusals):
    vector = torch.randn(backbone.d_model)
    rms = path_rms(backbone, edits, refusals, Shift(vector, 5), (5,))
    for value in rms.values():
        assert value == pytest.approx(vector.pow(2).mean().sqrt().item(), rel=1e-4)
    below = path_rms(backbone, edits, refusals, Shift(vector, 5), (1, 3))
    assert below == {"a": 0.0, "b": 0.0}


def test_moving_exactly_along_the_target_direction_has_cosine_one(backbone, edits, targets, refusals):
    """One prompt, one step, one layer: D^E computed here and added as the edit."""
    only = {"a": EditTarget(targets["a"].continuation[:2], targets["a"].anchor, targets["a"].teacher_ids, "own")}
    probe = alignments(backbone, edits[:1], only, refusals, Shift(torch.ones(backbone.d_model), 5), (5,))[0]
    direction = _state(backbone, only["a"].teacher_ids, only["a"].continuation) - _state(
        backbone, _prompt_ids(backbone, edits[0]), only["a"].continuation
    )
    along = alignments(backbone, edits[:1], only, refusals, Shift(direction, 5), (5,))[0]
    against = alignments(backbone, edits[:1], only, refusals, Shift(-direction, 5), (5,))[0]
    assert along.edit_whole == pytest.approx(1.0, abs=1e-4) and against.edit_whole == pytest.approx(-1.0, abs=1e-4)
    assert along.edit[0, 0] == pytest.approx(1.0, abs=1e-4)
    expected = torch.cosine_similarity(torch.ones(backbone.d_model), direction, dim=0).item()
    assert probe.edit_whole == pytest.approx(expected, abs=1e-4)


def _prompt_ids(backbone, p):
    from paving.backbone import checked_ids

    return checked_ids(backbone, p)


def _state(backbone, ids, continuation):
    """Layer 5's output at the position that predicts the continuation's second token."""
    row = torch.tensor([[*ids, continuation[0]]])
    with torch.no_grad():
        states = {}
        handle = backbone.layers[5].register_forward_hook(
            lambda _m, _i, out: states.setdefault("x", out if isinstance(out, torch.Tensor) else out[0])
        )
        backbone.model(input_ids=row)
        handle.remove()
    return states["x"][0, -1]


def test_a_prompt_is_measured_alike_alone_and_in_a_batch(backbone, edits, targets, refusals):
    controller = lively(backbone, policy=AlwaysOpen())
    together = alignments(backbone, edits, targets, refusals, controller, LAYERS)
    for p, mine in zip(edits, together, strict=True):
        (alone,) = alignments(backbone, [p], targets, refusals, controller, LAYERS)
        np.testing.assert_allclose(mine.edit, alone.edit, atol=1e-3)
        assert mine.nll_edited == pytest.approx(alone.nll_edited, abs=1e-4)
        assert mine.gate == alone.gate == 1.0


def test_a_target_of_one_token_is_named(backbone, edits, targets, refusals):
    with pytest.raises(ValueError, match=r"1 edit prompts have a target or refusal of fewer than two tokens \(first: b\)"):
        alignments(backbone, edits, targets, refusals | {"b": refusals["b"][:1]}, lively(backbone), LAYERS)
