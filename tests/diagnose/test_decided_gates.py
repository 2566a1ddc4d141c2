"""A controller that decides from kept states: the same edit as the controller itself, wherever the router reads."""

from __future__ import annotations

import pytest
import torch

from paving.controller import AlwaysOpen, Oracle, Soft
from paving.controller.residual_paving import boundary_features
from paving.diagnose.decided import Decided
from paving.evaluation.diagnostics.forced import ForcedPrompts
from paving.traces.forward import teacher_forced_logits
from paving.traces.prompt_states import prompt_states
from paving.traces.store import TraceStore
from tiny_models import LATE, ROUTED, batch_of, lively, tiny_backbone

TOKENS = (30, 31, 32)


@pytest.fixture(scope="module")
def quiet():
    return tiny_backbone()


def features(backbone, prompts, config, folder):
    states = prompt_states(backbone, TraceStore(folder), prompts)
    return {i: s.features(config.route_layers, config.pooling) for i, s in states.items()}


@pytest.mark.parametrize("config", [ROUTED, LATE], ids=["early routing", "late routing"])
@pytest.mark.parametrize("pooling", ["last", "mean", "last+mean"])
def test_kept_states_are_what_the_router_reads(quiet, prompts, config, pooling, tmp_path):
    config = config.model_copy(update={"pooling": pooling})
    batch = batch_of(quiet, prompts)
    kept = features(quiet, prompts, config, tmp_path)
    z = boundary_features(quiet, batch, config)
    torch.testing.assert_close(torch.stack([kept[i] for i in batch.ids]), z, atol=1e-5, rtol=1e-5)


def test_states_are_read_from_the_store_the_second_time(quiet, prompts, tmp_path):
    first = prompt_states(quiet, TraceStore(tmp_path), prompts)
    ticks = []
    second = prompt_states(quiet, TraceStore(tmp_path), prompts, tick=ticks.append)
    assert ticks == [len(prompts)]
    assert all(torch.equal(first[i].mean, second[i].mean) for i in first)


@pytest.mark.parametrize("config", [ROUTED, LATE], ids=["early routing", "late routing"])
@pytest.mark.parametrize("policy", [Soft(), AlwaysOpen(), Oracle()], ids=lambda p: p.name)
def test_a_decided_controller_edits_as_the_controller_does(quiet, prompts, config, policy, tmp_path):
    controller = lively(quiet, config, policy=policy)
    decided = Decided(controller, features(quiet, prompts, config, tmp_path))
    batch = batch_of(quiet, prompts)
    tokens = torch.tensor([TOKENS] * len(prompts))
    with torch.no_grad():
        with controller.apply(quiet, batch) as applied:
            expected = teacher_forced_logits(quiet, batch, tokens)
            rows = applied.rows()
        with decided.apply(quiet, batch) as applied:
            whole = teacher_forced_logits(quiet, batch, tokens)
        plain = teacher_forced_logits(quiet, batch, tokens)
    torch.testing.assert_close(whole, expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(whole, plain, atol=1e-2)
    states = decided.states(prompts, quiet.device)
    assert [states[i].gate for i in batch.ids] == pytest.approx([r.gate for r in rows], abs=1e-5)
    vetoing = lively(quiet, config, policy=policy, use_veto=True)
    with vetoing.apply(quiet, batch) as applied, torch.no_grad():
        quiet.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids)
        expected = [(r.veto, r.gate == 0) for r in applied.rows()]
    states = Decided(vetoing, decided.features).states(prompts, quiet.device)
    assert [(states[i].veto, states[i].gate == 0) for i in batch.ids] == expected


@pytest.mark.parametrize("config", [ROUTED, LATE], ids=["early routing", "late routing"])
def test_it_can_start_on_a_cached_prompt(quiet, prompts, config, tmp_path):
    controller = lively(quiet, config, policy=AlwaysOpen())
    decided = Decided(controller, features(quiet, prompts, config, tmp_path))
    batch = batch_of(quiet, prompts)
    rows = [ids[mask > 0].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    forced = ForcedPrompts(quiet, prompts, rows)
    edited = forced.run([TOKENS] * len(prompts), range(quiet.n_layers), decided)
    base = forced.run([TOKENS] * len(prompts), range(quiet.n_layers))
    tokens = torch.tensor([TOKENS] * len(prompts))
    for found, entered in ((edited, True), (base, False)):
        with torch.no_grad():
            if entered:
                with decided.apply(quiet, batch):
                    logits = teacher_forced_logits(quiet, batch, tokens)
            else:
                logits = teacher_forced_logits(quiet, batch, tokens)
        nll = -logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1).mean(1)
        assert found.nll == pytest.approx(nll.tolist(), abs=1e-3)
    assert edited.nll != pytest.approx(base.nll, abs=1e-3)


def test_the_model_is_left_without_a_hook(quiet, prompts, tmp_path):
    from tiny_models import hooks_on

    controller = lively(quiet, ROUTED, policy=AlwaysOpen())
    decided = Decided(controller, features(quiet, prompts, ROUTED, tmp_path))
    with pytest.raises(RuntimeError, match="stop"), decided.apply(quiet, batch_of(quiet, prompts)):
        assert hooks_on(quiet.model)
        raise RuntimeError("stop")
    assert not hooks_on(quiet.model)
