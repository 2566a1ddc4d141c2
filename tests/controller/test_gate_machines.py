"""Gates of kernel machines: they compute what scikit-learn does, and take nothing else of a controller over."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from paving.backbone import render_batch
from paving.controller import ControllerConfig, fresh_controller, load_controller, save_controller
from paving.controller.gate_machines import Machine, MachineShape
from paving.controller.gates import Hard
from paving.controller.regated import columns, standardised, with_gate
from paving.controller.residual_paving import boundary_features
from paving.prompts.types import Bucket, Prompt
from paving.traces.prompt_states import PromptStates
from paving.training.gate_search import fitted, machine_of

D, LAYERS = 6, 4


def made_up(n: int, seed: int = 0) -> tuple[list[Prompt], dict[str, PromptStates]]:
    rng = torch.Generator().manual_seed(seed)
    buckets = (Bucket.EDIT, Bucket.HARMFUL_KEEP)
    prompts = [Prompt(f"p{i}", f"text {i}", buckets[i % 2], group=f"g{i // 2}") for i in range(n)]
    states = {
        p.id: PromptStates(
            last=torch.randn(LAYERS, D, generator=rng) + (p.bucket is Bucket.EDIT),
            mean=torch.randn(LAYERS, D, generator=rng),
        )
        for p in prompts
    }
    return prompts, states


@pytest.mark.parametrize("kernel", ["rbf", "linear"])
def test_a_machine_scores_as_scikit_learn_does(kernel):
    prompts, states = made_up(40)
    machine, shape = fitted(states, prompts[:30], Bucket.HARMFUL_KEEP, ((0, 2), "last+mean", kernel))
    x = torch.stack([states[p.id].features((0, 2), "last+mean") for p in prompts])
    scale = StandardScaler().fit(x[:30].numpy())
    labels = [p.bucket is Bucket.EDIT for p in prompts[:30]]
    theirs = machine_of(kernel, x.shape[1]).fit(scale.transform(x[:30].numpy()), labels)
    np.testing.assert_allclose(machine.score(x), theirs.decision_function(scale.transform(x.numpy())), atol=1e-4)
    assert shape.n_columns == x.shape[1] == 4 * D
    machine.threshold.fill_(0.25)
    machine.slope.fill_(3.0)
    torch.testing.assert_close(machine(x), 3 * (machine.score(x) - 0.25))


def gates(n_columns: int) -> tuple[list[Machine], list[MachineShape]]:
    made = []
    for keep in ("harmful_keep", "benign_keep"):
        shape = MachineShape(closes_on=keep, kernel="rbf", n_columns=n_columns, n_support=5)
        machine = Machine(shape)
        machine.columns.copy_(torch.arange(n_columns))
        machine.support.normal_()
        machine.coef.normal_()
        machine.gamma.fill_(1 / n_columns)
        made.append((machine, shape))
    return [m for m, _ in made], [s for _, s in made]


@pytest.fixture
def regated(backbone):
    """A controller that reads blocks 0 and 1 at the last token, and the same with a gate on blocks 1 and 2, mean too."""
    old = fresh_controller(backbone, ControllerConfig(route_layers=(0, 1), edit_layers=(2,), bottleneck_ratio=4), seed=3)
    old.weights.router.mean.normal_()
    old.weights.veto.weight.normal_()
    old.weights.veto.fitted.fill_(1.0)
    machines, shapes = gates(2 * 2 * backbone.d_model)
    return old, with_gate(old, machines, shapes, (1, 2), "last+mean"), machines


def test_only_the_gate_is_another(backbone, regated):
    old, new, machines = regated
    assert new.config.route_layers == (0, 1, 2) and new.config.pooling == "last+mean" and new.policy == Hard(0.0)
    batch = render_batch(backbone, [Prompt("a", "w1 w2 w3", Bucket.EDIT, "a"), Prompt("b", "w4 w5", Bucket.EDIT, "b")])
    before, after = (boundary_features(backbone, batch, c.config) for c in (old, new))
    with torch.no_grad():
        logit, mixture = new.weights.route(after)
        torch.testing.assert_close(mixture, old.weights.router(before)[1])
        torch.testing.assert_close(
            new.weights.veto(new.weights.router.normalise(after)), old.weights.veto(old.weights.router.normalise(before))
        )
        mine = after[:, columns(new.config, (1, 2), "last+mean", backbone.d_model)]
        torch.testing.assert_close(logit, torch.minimum(*(m(mine) for m in machines)))
        assert not torch.allclose(logit, new.weights.router(after)[0])
    for name, value in old.weights.experts.state_dict().items():
        assert torch.equal(value, new.weights.experts.state_dict()[name])


def test_new_columns_are_standardised_and_decide_nothing_by_it(backbone, regated):
    old, new, _ = regated
    width = len(new.weights.router.mean)
    z = 100 * torch.randn(50, width, generator=torch.Generator().manual_seed(0)) + 7
    mine = columns(new.config, old.config.route_layers, old.config.pooling, backbone.d_model)
    z[:, mine] = z[:, mine] / 100 * old.weights.router.std + old.weights.router.mean
    done = standardised(new, old.config, z)
    assert new.weights.unlikeness(z).mean() > 10 and done.weights.unlikeness(z).mean() == pytest.approx(1, abs=0.2)
    for a, b in zip(done.weights.route(z), new.weights.route(z), strict=True):
        assert torch.equal(a, b)
    vetoes = [c.weights.veto(c.weights.router.normalise(z)) for c in (done, new)]
    assert torch.equal(*vetoes)


def test_a_searched_gate_is_saved_and_loaded(backbone, regated, tmp_path):
    _, new, _ = regated
    save_controller(new, tmp_path)
    loaded = load_controller(tmp_path, backbone)
    assert loaded.config == new.config and loaded.policy == new.policy
    z = torch.randn(3, new.config.n_features(backbone.d_model))
    assert torch.equal(loaded.weights.route(z)[0], new.weights.route(z)[0])


def test_columns_follow_layers_and_poolings():
    config = ControllerConfig(route_layers=(2, 5), pooling="last+mean", edit_layers=(6,))
    assert columns(config, (5,), "mean", 3).tolist() == [9, 10, 11]
    assert columns(config, (5, 2), "last", 2).tolist() == [4, 5, 0, 1]


def test_a_run_that_read_its_layers_in_another_order_keeps_mixture_and_veto(backbone):
    config = ControllerConfig(route_layers=(1, 0), edit_layers=(2,), bottleneck_ratio=4)
    old = fresh_controller(backbone, config, seed=3)
    old.weights.veto.weight.normal_()
    machines, shapes = gates(backbone.d_model)
    new = with_gate(old, machines, shapes, (0,), "last")
    z = {layer: torch.randn(2, backbone.d_model) for layer in (0, 1)}
    before, after = (torch.cat([z[layer] for layer in c.config.route_layers], dim=1) for c in (old, new))
    with torch.no_grad():
        torch.testing.assert_close(new.weights.router(after)[1], old.weights.router(before)[1])
        torch.testing.assert_close(new.weights.veto(after), old.weights.veto(before))


def test_machines_are_not_asked_of_a_fresh_controller(backbone):
    _, shapes = gates(backbone.d_model)
    with pytest.raises(ValueError, match="searched for one"):
        fresh_controller(backbone, ControllerConfig(gate=tuple(shapes)), seed=0)
