"""Where the router reads: last token or mean, in one pass or several, below or above the edited layers."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from paving.backbone.hooks import record_residuals
from paving.controller import ControllerConfig, Soft
from paving.controller.residual_paving import boundary_features
from paving.traces.forward import teacher_forced_logits
from tiny_models import LATE, ROUTED, batch_of, decode, lively, logits_of, some_prompts

MEAN = ROUTED.model_copy(update={"pooling": "mean"})
LATE_MEAN = LATE.model_copy(update={"pooling": "mean"})
BOTH = ROUTED.model_copy(update={"pooling": "last+mean"})


def hand_features(backbone, p, config: ControllerConfig) -> torch.Tensor:
    """One prompt without padding, its states written out."""
    batch = batch_of(backbone, [p])
    with record_residuals(backbone, config.route_layers) as states:
        logits_of(backbone, batch)
    rows = [states[layer][0] for layer in config.route_layers]  # (tokens, d)
    pools = {"last": lambda r: [r[-1]], "mean": lambda r: [r.mean(0)], "last+mean": lambda r: [r[-1], r.mean(0)]}
    return torch.cat([part for r in rows for part in pools[config.pooling](r)])


@pytest.mark.parametrize("config", [ROUTED, MEAN, BOTH, LATE, LATE_MEAN], ids=["last", "mean", "both", "late", "late mean"])
def test_features_are_the_hand_computed_ones_and_ignore_padding(any_backbone, config):
    prompts = some_prompts()[:4]
    z = boundary_features(any_backbone, batch_of(any_backbone, prompts), config)
    assert z.shape == (4, config.n_features(any_backbone.d_model))
    for row, p in zip(z, prompts, strict=True):
        torch.testing.assert_close(row, hand_features(any_backbone, p, config), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [ROUTED, MEAN, BOTH, LATE, LATE_MEAN], ids=["last", "mean", "both", "late", "late mean"])
def test_the_gate_inside_apply_is_the_one_of_the_boundary_features(backbone, batch, config):
    controller = lively(backbone, config, policy=Soft(), use_veto=True)
    expected = controller.decide(boundary_features(backbone, batch, config), batch)
    with controller.apply(backbone, batch) as applied:
        decode(backbone.model, batch, n=3)
    decided = applied.decision
    torch.testing.assert_close(decided.logit, expected.logit, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decided.mixture, expected.mixture, atol=1e-5, rtol=1e-5)
    assert torch.equal(decided.vetoed, expected.vetoed)


@pytest.mark.parametrize("config", [ROUTED, MEAN, BOTH], ids=["last", "mean", "both"])
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_a_prompt_read_in_several_passes_is_decided_as_in_one(backbone, batch, config, chunk):
    controller = lively(backbone, config, policy=Soft())
    with controller.apply(backbone, batch) as whole:
        expected = logits_of(backbone, batch)[:, -1]
    cache = DynamicCache()
    with controller.apply(backbone, batch) as parts, torch.no_grad():
        for start in range(0, batch.width, chunk):
            stop = min(start + chunk, batch.width)
            logits = backbone.model(
                input_ids=batch.input_ids[:, start:stop],
                attention_mask=batch.attention_mask[:, :stop],
                position_ids=batch.position_ids[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            ).logits
    torch.testing.assert_close(parts.decision.logit, whole.decision.logit, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[:, -1], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [ROUTED, MEAN, BOTH, LATE, LATE_MEAN], ids=["last", "mean", "both", "late", "late mean"])
def test_forced_tokens_in_the_same_pass_are_not_part_of_what_the_router_reads(backbone, batch, config):
    """Preservation and training run prompt and continuation at once; the gate must be that of the prompt."""
    controller = lively(backbone, config, policy=Soft())
    with controller.apply(backbone, batch) as alone:
        logits_of(backbone, batch)
    for forced in ([[5, 6, 7]], [[90, 91, 92]]):
        with controller.apply(backbone, batch) as applied, torch.no_grad():
            teacher_forced_logits(backbone, batch, torch.tensor(forced * len(batch)))
        torch.testing.assert_close(applied.decision.logit, alone.decision.logit, atol=1e-5, rtol=1e-5)


def test_a_router_above_the_edited_layers_reads_the_base_and_not_its_own_edit(backbone, batch):
    controller = lively(backbone, LATE, policy=Soft())
    gates = []
    for scale in (0.0, 1.0, 4.0):
        with controller.with_scale(scale).apply(backbone, batch) as applied:
            decode(backbone.model, batch, n=3)
        gates.append(applied.rows())
    assert gates[0] == gates[1] == gates[2]


def test_route_and_edit_layers_may_be_the_same_blocks(backbone, batch):
    config = ControllerConfig(route_layers=(2, 3), edit_layers=(2, 3), bottleneck_ratio=4, router_hidden=8)
    assert not config.reads_before_it_edits
    controller = lively(backbone, config, policy=Soft())
    expected = controller.decide(boundary_features(backbone, batch, config), batch)
    base = decode(backbone.model, batch, eos_token_id=None)
    with controller.apply(backbone, batch) as applied:
        assert not torch.equal(decode(backbone.model, batch, eos_token_id=None), base)
    torch.testing.assert_close(applied.decision.logit, expected.logit)


@pytest.mark.parametrize("config", [LATE, MEAN], ids=["late", "mean"])
def test_a_gate_that_needs_the_whole_prompt_refuses_to_start_inside_it(backbone, batch, config):
    with (
        pytest.raises(ValueError, match="start without a KV cache"),
        lively(backbone, config).apply(backbone, batch, start=2),
    ):
        pass
