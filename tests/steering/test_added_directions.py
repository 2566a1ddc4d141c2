"""CAA and edit-target ActAdd: the states of safe reframes against those of refusals, by arithmetic done here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from paving.backbone import BackboneError, render_ids
from paving.backbone.hooks import record_residuals
from paving.generation import Decoding, generate
from paving.prompts.types import Bucket, SplitName
from paving.steering.act_add import ActAddConfig, fit_act_add
from paving.steering.caa import CaaConfig, fit_caa
from paving.steering.checks import SteeringError
from paving.steering.routing import Global
from paving.steering.steered import Steered
from tiny_material import tiny_material
from tiny_models import tiny_backbone

N_TOKENS = 4


@pytest.fixture(scope="module")
def llama():
    return tiny_backbone()


@pytest.fixture(scope="module")
def material(llama):
    return tiny_material(llama)


@pytest.fixture(scope="module")
def pairs(llama, material):
    """Layer 3: (reframe, refusal) (n, d_model) float64 numpy, prompt by prompt, the end of turn left out."""

    def states(known):
        found = []
        for p in material.of(SplitName.TRAIN, Bucket.EDIT):
            answer = list(known[p.id][:-1][:N_TOKENS])
            assert known[p.id][-1] in llama.eos_ids
            with torch.no_grad(), record_residuals(llama, (3,)) as seen:
                llama.model(input_ids=torch.tensor([render_ids(llama, p.text) + answer]), use_cache=False)
            found.append(seen[3][0, -len(answer) :].double().numpy().mean(0))
        return np.stack(found)

    return states(material.targets), states(material.answers)


def test_caa_mean_is_the_mean_difference_of_the_pairs(llama, material, pairs):
    ticks = []
    caa = fit_caa(llama, material, CaaConfig(layer=3, answer_tokens=N_TOKENS, extraction="mean"), tick=ticks.append)
    np.testing.assert_allclose(caa.vector.numpy(), (pairs[0] - pairs[1]).mean(0), atol=1e-4)
    assert caa.n_pairs == 7 and sum(ticks) == 14
    editor = caa.editor()
    assert (editor.layer, editor.positions) == (3, "answer") and torch.equal(editor.vector, caa.vector)


def test_caa_pca_is_what_the_mean_has_along_the_first_component_of_the_differences(llama, material, pairs):
    caa = fit_caa(llama, material, CaaConfig(layer=3, answer_tokens=N_TOKENS))
    differences = pairs[0] - pairs[1]
    _, vectors = np.linalg.eigh(differences.T @ differences)
    component = vectors[:, -1]
    np.testing.assert_allclose(caa.vector.numpy(), (differences.mean(0) @ component) * component, atol=1e-3)
    assert not np.allclose(caa.vector.numpy(), differences.mean(0), atol=1e-2)


def test_act_add_is_one_mean_state_less_the_other_added_everywhere(llama, material, pairs):
    found = fit_act_add(llama, material, ActAddConfig(layer=3, answer_tokens=N_TOKENS))
    np.testing.assert_allclose(found.vector.numpy(), pairs[0].mean(0) - pairs[1].mean(0), atol=1e-4)
    assert (found.editor().layer, found.editor().positions) == (3, "all")


def test_the_layer_lies_at_two_fifths_unless_it_is_named(llama, material):
    assert fit_caa(llama, material).layer == fit_act_add(llama, material).layer == 2  # of 6
    with pytest.raises(BackboneError, match="steering layer 6 does not exist"):
        fit_caa(llama, material, CaaConfig(layer=6))


def test_each_text_is_run_once(llama, material):
    rows = []
    with record_residuals(llama, [0], keep=lambda resid: rows.append(len(resid))):
        fit_caa(llama, material)
    assert sum(rows) == 14


@pytest.mark.parametrize("side", ["answers", "targets"])
def test_an_edit_prompt_without_both_answers_is_refused(llama, material, side):
    known = dict(getattr(material, side))
    known["train-edit-3"] = (llama.eos_ids[0],)
    with pytest.raises(SteeringError, match=rf"train-edit-3 has no tokens in Material\.{side}"):
        fit_act_add(llama, replace(material, **{side: known}))


@pytest.mark.parametrize("fit", [fit_caa, fit_act_add])
def test_fitted_directions_steer_and_each_row_is_as_it_is_alone(llama, material, fit):
    fitted = fit(llama, material)
    prompts = list(material.of(SplitName.CALIBRATION, Bucket.EDIT))
    steered = Steered("s", fitted.editor(), Global(), 4.0, fitted.base_name, fitted.base_fingerprint)
    short = Decoding(max_new_tokens=4)
    together = [c.response for c in generate(llama, prompts, steered, short)]
    assert together == [generate(llama, [p], steered, short)[0].response for p in prompts]
    assert together != [c.response for c in generate(llama, prompts, replace(steered, scale=0.0), short)]
