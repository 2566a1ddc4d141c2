"""What all comparators share: a change made row by row, and which rows it is made to."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch

from paving.backbone import BackboneError, render_batch
from paving.backbone.hooks import edit_residuals, record_residuals
from paving.generation import Decoding, generate
from paving.intervention import Identity
from paving.prompts.types import Bucket, SplitName, Splits
from paving.steering.checks import SteeringError
from paving.steering.material import Material
from paving.steering.routing import Global, Labelled, Linear, Probe, fit_probe
from paving.steering.row_edits import ablating, adding, row_edit
from paving.steering.steered import Steered
from paving.traces.boundary import boundary_states
from tiny_models import hooks_on, logits_of, prompt, tiny_backbone

VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(3))
UNIT = VECTOR / VECTOR.norm()


def six():
    return [prompt(f"p{i}", range(10 * i, 10 * i + 4 + i), list(Bucket)[i % 3]) for i in range(6)]


@dataclass(frozen=True)
class AddAt:
    """The simplest editor: one vector at one block's output."""

    layer: int = 2
    positions: str = "all"

    @contextmanager
    def editing(self, backbone, batch, strength):
        with edit_residuals(backbone, {self.layer: row_edit(adding(VECTOR), strength, batch, self.positions)}):
            yield


def steered(backbone, routing=None, scale=2.0, editor=None) -> Steered:
    return Steered("add", editor or AddAt(), routing or Global(), scale, backbone.name, backbone.fingerprint)


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.fixture(scope="module")
def batch(backbone):
    return render_batch(backbone, six())


@pytest.mark.parametrize("positions", ["all", "answer"])
def test_each_row_moves_by_its_own_strength_and_the_others_keep_their_bits(backbone, batch, positions):
    strength = torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0, 0.0])
    before = torch.randn(6, batch.width, 32)
    after = row_edit(adding(VECTOR), strength, batch, positions)(before)
    first = 0 if positions == "all" else batch.width - 1
    for row, s in enumerate(strength.tolist()):
        if s == 0:
            assert torch.equal(after[row], before[row])
        torch.testing.assert_close(after[row, first:] - before[row, first:], (s * VECTOR).expand_as(before[row, first:]))
    assert torch.equal(after[:, :first], before[:, :first])


def test_answer_positions_are_counted_over_passes(batch):
    edit = row_edit(adding(VECTOR), torch.ones(6), batch, "answer")
    prompt_part, last, token = torch.zeros(6, batch.width - 1, 32), torch.zeros(6, 1, 32), torch.zeros(6, 1, 32)
    assert edit(prompt_part) is None
    assert edit(last).abs().sum() > 0 and edit(token).abs().sum() > 0


def test_samples_follow_their_prompts_row(batch):
    strength = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    after = row_edit(adding(VECTOR), strength, batch)(torch.zeros(12, 1, 32))
    assert after.abs().sum((1, 2)).nonzero().squeeze(-1).tolist() == [2, 3]


@pytest.mark.parametrize("level", [0.0, 1.5])
def test_an_ablated_component_has_the_level_asked_for_and_the_rest_is_untouched(batch, level):
    before = torch.randn(6, 3, 32)
    after = row_edit(ablating(UNIT, level), torch.ones(6), batch)(before)
    torch.testing.assert_close(after @ UNIT, torch.full((6, 3), level), atol=1e-5, rtol=0)
    rest = before - (before @ UNIT)[..., None] * UNIT
    torch.testing.assert_close(after - level * UNIT, rest, atol=1e-5, rtol=0)


def test_where_no_gate_opens_nothing_is_hooked_and_every_bit_is_the_bases(backbone, batch):
    keeps = replace(batch, bucket=(Bucket.BENIGN_KEEP,) * 6)
    base = logits_of(backbone, keeps)
    with steered(backbone, Labelled()).apply(backbone, keeps) as applied:
        assert torch.equal(logits_of(backbone, keeps), base)
        assert all(s.gate == 0 for s in applied.rows())
        assert hooks_on(backbone.model) == []
    with steered(backbone, scale=0.0).apply(backbone, batch):
        assert torch.equal(logits_of(backbone, batch), base)
    with steered(backbone).apply(backbone, batch):
        assert not torch.equal(logits_of(backbone, batch), base)
    assert torch.equal(logits_of(backbone, batch), base)


def test_only_the_oracle_reads_labels(backbone, batch):
    probe = Probe((1, 2), "last", *_two_probes(backbone, batch))
    shuffled = replace(batch, bucket=batch.bucket[::-1])
    unlabelled = replace(batch, bucket=(None,) * 6)
    for routing in (Global(), probe, replace(probe, veto=None)):
        assert routing.route(backbone, batch) == routing.route(backbone, shuffled) == routing.route(backbone, unlabelled)
    assert [s.gate for s in Labelled().route(backbone, batch)] == [float(b is Bucket.EDIT) for b in batch.bucket]
    with pytest.raises(SteeringError, match="needs the true bucket"):
        Labelled().route(backbone, unlabelled)


def _two_probes(backbone, batch) -> tuple[Linear, Linear]:
    z = boundary_states(backbone, batch, (1, 2), "last")
    return fit_probe(z, [True, True, True, False, False, False]), fit_probe(z, [False, False, True, False, False, True])


def test_a_probe_separates_what_it_was_fitted_on_and_the_veto_closes_its_gates(backbone, batch):
    edit, veto = _two_probes(backbone, batch)
    alone = Probe((1, 2), "last", edit).route(backbone, batch)
    assert [s.gate for s in alone] == [1, 1, 1, 0, 0, 0] and all(s.veto is None for s in alone)
    vetoed = Probe((1, 2), "last", edit, veto).route(backbone, batch)
    assert [s.gate for s in vetoed] == [1, 1, 0, 0, 0, 0] and [s.veto for s in vetoed] == [0, 0, 1, 0, 0, 1]
    assert (Probe((1,), "last", edit).name, Probe((1,), "last", edit, veto).name) == ("probe", "probe+veto")


def test_a_probe_of_one_class_is_refused():
    with pytest.raises(SteeringError, match="only one kind"):
        fit_probe(torch.randn(4, 8), [True] * 4)


def test_a_row_of_a_batch_is_edited_as_it_is_alone(backbone):
    prompts = six()
    whole = render_batch(backbone, prompts)
    probe = Probe((1, 2), "last+mean", fit_probe(boundary_states(backbone, whole, (1, 2), "last+mean"), [1, 0, 1, 0, 1, 0]))
    for routing in (Global(), Labelled(), probe):
        done = generate(backbone, prompts, steered(backbone, routing), Decoding(max_new_tokens=5))
        alone = [generate(backbone, [p], steered(backbone, routing), Decoding(max_new_tokens=5))[0] for p in prompts]
        assert [(c.response, c.gate) for c in done] == [(c.response, c.gate) for c in alone]


def test_another_base_and_a_negative_scale_are_refused(backbone, batch):
    with pytest.raises(SteeringError, match="0 or more"):
        steered(backbone, scale=-1.0)
    with pytest.raises(BackboneError, match="fitted on"), steered(backbone).apply(tiny_backbone(seed=1), batch):
        pass


def test_hooks_leave_with_the_context_also_on_an_error(backbone, batch):
    with pytest.raises(KeyError), steered(backbone).apply(backbone, batch):
        raise KeyError
    assert hooks_on(backbone.model) == []


def test_answers_of_single_rows_are_taken_from_rows_that_were_decided_alike(backbone):
    """A mixed batch: open rows from the global row, closed ones from the base. Nothing is decoded, and nothing differs."""
    prompts = six()
    short = Decoding(max_new_tokens=6)
    base = {c.id: c for c in generate(backbone, prompts, Identity(), short)}
    everywhere = {c.id: c for c in generate(backbone, prompts, steered(backbone), short)}
    mixed = steered(backbone, Labelled())
    decoded = generate(backbone, prompts, mixed, short)
    passes = []
    with record_residuals(backbone, [0], keep=lambda resid: passes.append(resid.shape)):
        taken = generate(backbone, prompts, mixed, short, known=[base, everywhere], by_row=True)
    assert taken == decoded and len({c.gate for c in taken}) == 2
    assert len(passes) == 1  # the prompt alone
    passes.clear()
    with record_residuals(backbone, [0], keep=lambda resid: passes.append(resid.shape)):
        generate(backbone, prompts, mixed, short, known=[base, everywhere])
    assert len(passes) > 1  # whole batches only, unless it is asked for


def test_rows_are_not_taken_one_by_one_where_several_decode_or_by_sampling(backbone, monkeypatch):
    with pytest.raises(ValueError, match="row by row where one process decodes greedily"):
        generate(backbone, six(), Identity(), Decoding(max_new_tokens=2, do_sample=True), by_row=True)
    monkeypatch.setattr("paving.generation.rank_and_world", lambda: (0, 2))
    with pytest.raises(ValueError, match="not by several"):
        generate(backbone, six(), Identity(), Decoding(max_new_tokens=2), by_row=True)


def test_rows_that_are_known_nowhere_are_decoded_without_those_that_are(backbone):
    prompts = six()
    short = Decoding(max_new_tokens=6)
    base = {c.id: c for c in generate(backbone, prompts, Identity(), short)}
    mixed = steered(backbone, Labelled())
    decoded = generate(backbone, prompts, mixed, short)
    n_open, rows, ticks = sum(c.gate > 0 for c in decoded), [], []
    assert 0 < n_open < len(prompts)
    with record_residuals(backbone, [0], keep=lambda resid: rows.append(len(resid))):
        found = generate(backbone, prompts, mixed, short, known=[base], by_row=True, tick=ticks.append)
    assert [c.response for c in found] == [c.response for c in decoded] and [c.id for c in found] == [p.id for p in prompts]
    assert rows[0] == len(prompts) and set(rows[1:]) == {n_open} and sum(ticks) == len(prompts)
    rows.clear()
    with record_residuals(backbone, [0], keep=lambda resid: rows.append(len(resid))):
        generate(backbone, prompts, steered(backbone), short, known=[base], by_row=True)
    assert set(rows) == {len(prompts)} and len(rows) <= short.max_new_tokens  # nothing known: nothing read twice


def test_material_gives_no_held_out_prompts_and_no_edit_prompt_without_a_target():
    rows = tuple(prompt(f"{b.value}{i}", [i], b) for b in Bucket for i in range(2))
    material = Material(Splits(rows, (), rows), {"edit1": (5,)}, {})
    assert [p.id for p in material.of(SplitName.TRAIN, Bucket.EDIT)] == ["edit1"]
    with pytest.raises(SteeringError, match="for measuring"):
        material.of(SplitName.HELD_OUT, Bucket.EDIT)
    with pytest.raises(SteeringError, match="no harmful_keep prompts"):
        material.of(SplitName.CALIBRATION, Bucket.HARMFUL_KEEP)
