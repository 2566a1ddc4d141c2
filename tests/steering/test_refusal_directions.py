"""DIM: what is read of the prompts, how often they are run, and which direction is chosen."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch

from paving.backbone import render_batch, render_ids
from paving.backbone.hooks import record_residuals
from paving.prompts.types import Bucket, SplitName
from paving.steering import directions
from paving.steering.checks import SteeringError
from paving.steering.dim import DimConfig, fit_dim
from paving.steering.dim_selection import Candidate, Limits, choose
from paving.steering.directions import position_means, post_instruction_tokens
from paving.steering.refusal_score import RefusalTokens, refusal_scores, refusal_tokens
from tiny_material import REFUSAL_FIRST, tiny_material
from tiny_models import HIDDEN, LAYERS, hooks_on, logits_of, tiny_backbone

ROWS = ([5, 6, 7, 8, 9, 2, 5], [10, 11, 2, 5], [12, 13, 14, 2, 5], [15, 16, 17, 18, 19, 20, 21, 2, 5])
WIDE = {"kl_limit": 1e9, "induced_limit": -1e9}


@pytest.fixture(scope="module")
def llama():
    return tiny_backbone()


@pytest.fixture(scope="module")
def material(llama):
    return tiny_material(llama)


def state_alone(backbone, row, layer, position):
    """Block output of one unpadded row, layer by layer and token by token."""
    with torch.no_grad(), record_residuals(backbone, (layer,)) as seen:
        backbone.model(input_ids=torch.tensor([row]), use_cache=False)
    return seen[layer][0, position]


# --- reading --------------------------------------------------------------------------------------------------------


def test_means_at_every_layer_and_position_are_those_of_the_rows_alone(any_backbone):
    found = position_means(any_backbone, ROWS, 3, batch_size=3)
    assert found.shape == (LAYERS, 3, HIDDEN) and found.dtype == torch.float32
    for layer in (0, 3, LAYERS - 1):
        for position in (-3, -2, -1):
            alone = torch.stack([state_alone(any_backbone, row, layer, position) for row in ROWS]).mean(0)
            torch.testing.assert_close(found[layer, position], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n_positions", [1, 3])
def test_each_prompt_is_run_once_for_all_layers_and_positions_and_only_sums_are_kept(llama, monkeypatch, n_positions):
    kept = []
    read = directions.read_states

    def watched(*args):
        seen = read(*args)
        kept.extend(state.shape for state in seen.values())
        return seen

    monkeypatch.setattr(directions, "read_states", watched)
    passes, ticks = [], []
    rows = ROWS * 5
    with record_residuals(llama, [0], keep=lambda resid: passes.append(len(resid))):
        position_means(llama, rows, n_positions, batch_size=8, tick=ticks.append)
    assert sum(passes) == len(rows) and len(passes) == math.ceil(len(rows) / 8)
    assert ticks == passes
    assert set(kept) == {(n_positions, HIDDEN)}  # not a row's own state


def test_the_tokens_behind_the_instruction_are_what_all_prompts_end_with(llama):
    rows = [render_ids(llama, text) for text in ("w5 w6", "w9", "w7 w8 w9 w10")]
    assert post_instruction_tokens(rows) == 2  # <eos> <assistant>
    assert llama.tokenizer.convert_ids_to_tokens(rows[0][-2:]) == ["<eos>", "<assistant>"]
    assert post_instruction_tokens([[1, 2, 3], [1, 2, 4]]) == 1  # a template that adds nothing: the last user token
    assert post_instruction_tokens([[2, 3], [1, 2, 3]]) == 2
    with pytest.raises(SteeringError, match="no two of them differ"):
        post_instruction_tokens([[1, 2], [1, 2]])


def test_more_positions_than_a_row_has_are_refused(llama):
    with pytest.raises(SteeringError, match="shortest of 4 rows has 4"):
        position_means(llama, ROWS, 5)
    with pytest.raises(SteeringError, match="shortest of 0 rows"):
        position_means(llama, [], 1)


# --- the refusal score ----------------------------------------------------------------------------------------------


def test_refusal_tokens_are_the_fewest_first_tokens_of_the_bases_refusals(material):
    edit = material.of(SplitName.TRAIN, Bucket.EDIT)
    counts = Counter(material.answers[p.id][0] for p in edit)
    assert counts == {103: 5, 104: 2}
    assert refusal_tokens(material, 0.7) == RefusalTokens((103,), 5 / 7, 7)
    assert refusal_tokens(material, 0.9) == RefusalTokens(REFUSAL_FIRST, 1.0, 7)


def test_a_token_that_benign_answers_begin_with_as_often_is_none_of_a_refusal(material):
    benign = {p.id: (104, 1) for p in material.of(SplitName.TRAIN, Bucket.BENIGN_KEEP)}
    assert refusal_tokens(replace(material, answers={**material.answers, **benign})) == RefusalTokens((103,), 5 / 7, 7)
    benign = {i: (token, 1) for i, token in zip(benign, [103] * 5 + [104] * 2, strict=True)}
    with pytest.raises(SteeringError, match=r"7 refusals .* no refusal score"):
        refusal_tokens(replace(material, answers={**material.answers, **benign}))


def test_the_score_is_the_log_odds_of_the_tokens():
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    found = refusal_scores(p.log() + 3, (0, 3))
    torch.testing.assert_close(found, torch.tensor([math.log(0.5 / 0.5), math.log(0.5 / 0.5)], dtype=torch.float64))
    found = refusal_scores(p.log() + 3, (1,))
    torch.testing.assert_close(found, torch.tensor([math.log(0.2 / 0.8), math.log(0.25 / 0.75)], dtype=torch.float64))


# --- the choice -----------------------------------------------------------------------------------------------------


def by_hand(backbone, material, tokens=REFUSAL_FIRST, n_positions=2, depth=0.8):
    """{(layer, position): (r, kl, induced, refusal)} by loops over prompts, one at a time, with hooks written here."""

    def rows(split, bucket):
        return [render_ids(backbone, p.text) for p in material.of(split, bucket)]

    def probabilities(prompts, hooks=()):
        handles = [register(hook) for register, hook in hooks]
        with torch.no_grad():
            found = [backbone.model(input_ids=torch.tensor([r]), use_cache=False).logits[0, -1] for r in prompts]
        for handle in handles:
            handle.remove()
        return [logits.double().softmax(-1) for logits in found]

    def score(found):
        each = [p[list(tokens)].sum() for p in found]
        return float(sum(math.log(p / (1 - p)) for p in each) / len(each))

    harmful, benign = (rows(SplitName.TRAIN, b) for b in (Bucket.HARMFUL_KEEP, Bucket.BENIGN_KEEP))
    refused, kept = (rows(SplitName.CALIBRATION, b) for b in (Bucket.EDIT, Bucket.BENIGN_KEEP))
    base = probabilities(kept)
    found = {}
    for layer in range(backbone.n_layers):
        if layer + 1 >= int(depth * backbone.n_layers):  # the block that reads the state lies too deep
            continue
        for position in range(-n_positions, 0):
            means = [sum(state_alone(backbone, r, layer, position) for r in side) / len(side) for side in (harmful, benign)]
            r = means[0] - means[1]
            unit = r / r.norm()

            def without(x, unit=unit):
                return x - torch.einsum("btd,d,e->bte", x, unit, unit)

            ablating = []
            for block in backbone.layers:
                ablating.append((block.register_forward_pre_hook, lambda _m, inputs, w=without: (w(inputs[0]), *inputs[1:])))
                ablating.append(
                    (block.self_attn.register_forward_hook, lambda _m, _i, out, w=without: (w(out[0]), *out[1:]))
                )
                ablating.append((block.mlp.register_forward_hook, lambda _m, _i, out, w=without: w(out)))
            reader = backbone.layers[layer + 1]
            adding = [(reader.register_forward_pre_hook, lambda _m, inputs, r=r: (inputs[0] + r, *inputs[1:]))]
            ablated = probabilities(kept, ablating)
            kl = float(sum((p * (p / q).log()).sum() for p, q in zip(base, ablated, strict=True)) / len(base))
            found[layer, position] = (r, kl, score(probabilities(kept, adding)), score(probabilities(refused, ablating)))
    return found


@pytest.fixture(scope="module")
def scores(llama, material):
    return by_hand(llama, material)


def test_every_score_is_that_of_a_loop_over_single_prompts(llama, material, scores):
    told, ticks = [], []

    def stage(what, total):
        told.append((what, total))
        return ticks.append

    dim = fit_dim(llama, material, DimConfig(batch_size=3, **WIDE), stage=stage)
    assert {(c.layer, c.position) for c in dim.candidates} == scores.keys() and len(scores) == 6
    for c in dim.candidates:
        _, kl, induced, refusal = scores[c.layer, c.position]
        assert (c.kl, c.induced, c.refusal) == pytest.approx((kl, induced, refusal), rel=1e-3, abs=1e-4)
    assert told == [("DIM: directions", 6)] and ticks == [1] * 6
    assert dim.tokens.ids == REFUSAL_FIRST
    assert hooks_on(llama.model) == []


def _chosen_by_loop(scores, kl_limit, induced_limit):
    best = None
    for place, (_, kl, induced, refusal) in scores.items():
        if kl <= kl_limit and induced >= induced_limit and (best is None or refusal < scores[best][3]):
            best = place
    return best


def test_the_choice_is_that_of_a_brute_force_loop_whatever_the_limits(llama, material, scores):
    """Limits on a grid: each lets the best two, four or all six of the directions pass."""
    kls, induced = sorted(s[1] for s in scores.values()), sorted((s[2] for s in scores.values()), reverse=True)
    expected = {}
    for a, b in product((1, 3, 5), repeat=2):
        limits = {"kl_limit": kls[a] * 1.0001, "induced_limit": induced[b] - 1e-4}
        expected[a, b] = place = _chosen_by_loop(scores, **limits)
        if place is None:
            with pytest.raises(SteeringError, match="none of 6"):
                fit_dim(llama, material, DimConfig(**limits))
            continue
        dim = fit_dim(llama, material, DimConfig(**limits))
        assert (dim.chosen.layer, dim.chosen.position) == place
        torch.testing.assert_close(dim.direction, scores[place][0], atol=1e-4, rtol=1e-4)
    # Both limits really decide: with either wide open, the other changes the choice.
    assert len({expected[a, 5] for a in (1, 3, 5)}) > 1 and len({expected[5, b] for b in (1, 3, 5)}) > 1


def test_where_no_direction_is_within_the_limits_the_error_counts_them(llama, material, scores):
    kl = sorted(s[1] for s in scores.values())[2] * 1.001  # three stay
    with pytest.raises(SteeringError, match=r"none of 6 .* 3 change benign .* of the rest 3 reach no mean"):
        fit_dim(llama, material, DimConfig(kl_limit=kl, induced_limit=1e6))


def test_scores_that_are_no_numbers_are_never_chosen():
    nan = float("nan")
    candidates = [Candidate(0, -1, nan), Candidate(1, -1, 0.0, nan), Candidate(2, -1, 0.0, 1.0, nan), Candidate(3, -1)]
    with pytest.raises(SteeringError, match=r"none of 4 .* 1 have no length; 1 change .* rest 1 reach .* 1 have no finite"):
        choose(candidates, Limits(0.1, 0.0))
    assert choose([*candidates, Candidate(4, -1, 0.0, 1.0, 5.0)], Limits(0.1, 0.0)).layer == 4


def test_passes_that_cannot_change_the_choice_are_left_out(llama, material):
    rows = []
    with record_residuals(llama, [0], keep=lambda resid: rows.append(len(resid))), pytest.raises(SteeringError):
        fit_dim(llama, material, DimConfig(kl_limit=0.0, told_apart=False))
    assert sum(rows) == 2 * 7 + 7 + 6 * 7  # training keeps, benign calibration prompts, and these once a direction
    rows.clear()
    with record_residuals(llama, [0], keep=lambda resid: rows.append(len(resid))):
        fit_dim(llama, material, DimConfig(calibration_prompts=4, last_positions=1, layer_step=2, told_apart=False, **WIDE))
    assert sum(rows) == 2 * 7 + 4 + 2 * 3 * 4  # two layers, one token, three scores


def test_candidates_are_all_tokens_behind_the_instruction_or_the_last_few(llama, material):
    for last, expected in ((None, {-2, -1}), (1, {-1}), (5, {-2, -1})):
        dim = fit_dim(llama, material, DimConfig(last_positions=last, **WIDE))
        assert {c.position for c in dim.candidates} == expected
        assert {c.layer for c in dim.candidates} == {0, 1, 2}  # read by blocks 1 to 3 of 6: below 4.8
    with pytest.raises(SteeringError, match=r"Widen DimConfig\.depth"):
        fit_dim(llama, material, DimConfig(depth=0.1))


def test_the_editors_of_a_direction(llama, material):
    dim = fit_dim(llama, material, DimConfig(**WIDE))
    batch = render_batch(llama, list(material.of(SplitName.CALIBRATION, Bucket.EDIT)))
    one = torch.ones(len(batch))

    def logits(editor):
        with editor.editing(llama, batch, one):
            return logits_of(llama, batch)

    torch.testing.assert_close(logits(dim.ablation()), logits(dim.orthogonal()), atol=1e-4, rtol=0)
    assert torch.equal(dim.act_add().vector, dim.direction) and torch.equal(dim.act_sub().vector, -dim.direction)
    assert dim.act_sub().layer == dim.chosen.layer and dim.act_sub().positions == "all"
    assert not torch.allclose(logits(dim.act_add()), logits(dim.act_sub()), atol=1e-2)
    assert float(dim.ablation().unit @ dim.direction) == pytest.approx(float(dim.direction.norm()), rel=1e-5)
    assert dim.base_fingerprint == llama.fingerprint


def test_limits_are_widened_only_where_it_was_asked_for_and_the_result_says_how_far(llama, material, scores):
    """From too tight a KL limit: doubled until some direction passes, and the choice is the brute-force one under it."""
    least = min(kl for _, kl, _, _ in scores.values())
    tight = {**WIDE, "kl_limit": least / 3, "induced_limit": -1e6}
    with pytest.raises(SteeringError, match="may be chosen"):
        fit_dim(llama, material, DimConfig(**tight))
    dim = fit_dim(llama, material, DimConfig(**tight, widen=True))
    assert dim.limits.kl == pytest.approx(4 * least / 3) and dim.limits.induced == -1e6
    assert (dim.chosen.layer, dim.chosen.position) == _chosen_by_loop(scores, dim.limits.kl, -1e6)
    mute = fit_dim(llama, material, DimConfig(**{**tight, "kl_limit": 1e6, "induced_limit": 1e6}, widen=True))
    assert mute.limits.induced == -math.inf and mute.limits.kl == 1e6
    assert (mute.chosen.layer, mute.chosen.position) == _chosen_by_loop(scores, 1e6, -math.inf)


def test_directions_are_read_of_prompts_that_the_base_tells_apart(llama, material, monkeypatch):
    """As the published code filters them. Where too few would be left, a bucket is read whole, and it is said."""
    harmful, benign = (material.of(SplitName.TRAIN, b) for b in (Bucket.HARMFUL_KEEP, Bucket.BENIGN_KEEP))
    wrong = {harmful[0].id: -1.0, benign[1].id: 2.0, material.of(SplitName.CALIBRATION, Bucket.BENIGN_KEEP)[0].id: 3.0}

    def scores(_backbone, prompts, *_args, **_kwargs):
        return {p.id: wrong.get(p.id, -1.0 if p.bucket is Bucket.BENIGN_KEEP else 1.0) for p in prompts}

    monkeypatch.setattr("paving.steering.dim.prompt_scores", scores)
    found = fit_dim(llama, material, DimConfig(fewest=5, **WIDE))
    assert found.read == {
        "training harmful_keep": (6, 6, 7), "training benign_keep": (6, 6, 7),
        "calibration edit": (7, 7, 7), "calibration benign_keep": (6, 6, 7),
    }  # fmt: skip
    place = (found.chosen.layer, found.chosen.position)
    kept = [p for p in (*harmful, *benign) if p.id not in wrong]
    means = [
        torch.stack([state_alone(llama, render_ids(llama, p.text), *place) for p in kept if p.bucket is bucket]).mean(0)
        for bucket in (Bucket.HARMFUL_KEEP, Bucket.BENIGN_KEEP)
    ]
    torch.testing.assert_close(found.direction, means[0] - means[1], atol=1e-4, rtol=1e-4)
    whole = fit_dim(llama, material, DimConfig(fewest=7, **WIDE))
    assert whole.read["training harmful_keep"] == whole.read["calibration benign_keep"] == (7, 6, 7)
