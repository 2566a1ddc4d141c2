"""A controller with another gate: the same experts, mixture and veto, and machines that read what they were fitted on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from paving.controller.config import ControllerConfig
from paving.controller.gate_machines import Machine, MachineShape
from paving.controller.gates import Hard
from paving.controller.residual_paving import ResidualPaving
from paving.controller.weights import ControllerWeights, Router, Veto

FEATURE_WIDE = ("mean", "std", "weight", "body.0.weight")  # of router and veto: a column for each feature


def with_gate(
    controller: ResidualPaving,
    machines: Sequence[Machine],
    shapes: Sequence[MachineShape],
    layers: Sequence[int],
    pooling: str,
) -> ResidualPaving:
    """`controller` with its gate decided by machines on the features of `layers` and `pooling`; weights are copied.

    It reads what it read before as well, for mixture and veto. The gate is hard: experts were fitted for a gate near 1 on
    edit prompts, and a machine's margin says how sure it is, not how much edit a prompt needs. The veto stays as it is;
    p-values of the old gate do not.
    """
    old = controller.config
    poolings = [p for p in ("last", "mean") if p in old.pooling or p in pooling]
    config = old.model_copy(
        update={
            "route_layers": tuple(sorted({*old.route_layers, *layers})),
            "pooling": "+".join(poolings),
            "gate": tuple(shapes),
        }
    )
    d_model = controller.weights.experts.w_out.shape[-1]
    weights = ControllerWeights(config, d_model, controller.weights.experts.n_layers)
    weights.experts.load_state_dict(controller.weights.experts.state_dict())
    before = columns(config, old.route_layers, old.pooling, d_model)
    _widen(controller.weights.router, weights.router, before)
    _widen(controller.weights.veto, weights.veto, before)
    mine = columns(config, layers, pooling, d_model)
    for machine, target in zip(machines, weights.gate.machines, strict=True):
        target.load_state_dict(machine.state_dict() | {"columns": mine[machine.columns]})
    weights.to(controller.weights.veto.bias.device).eval().requires_grad_(False)
    return replace(controller, config=config, weights=weights, policy=Hard(0.0), reference=None)


def standardised(controller: ResidualPaving, old: ControllerConfig, z: Tensor) -> ResidualPaving:
    """The controller with statistics of `z` (n, n_features) for the columns that `old` did not read: they count nothing in
    mixture and veto, and in how far a prompt lies from those that were fitted on they do."""
    router, d_model = controller.weights.router, controller.weights.experts.w_out.shape[-1]
    new = torch.ones(z.shape[1], dtype=torch.bool)
    new[columns(controller.config, old.route_layers, old.pooling, d_model)] = False
    new = new.to(router.mean.device)
    weights = copy.deepcopy(controller.weights)
    weights.router.mean[new] = z.to(router.mean)[:, new].mean(0)
    weights.router.std[new] = z.to(router.std)[:, new].std(0, correction=0).clamp_min(1e-6)
    return replace(controller, weights=weights)


def columns(config: ControllerConfig, layers: Sequence[int], pooling: str, d_model: int) -> Tensor:
    """Where the features of some layers and a pooling stand within the features that `config` reads; (n,) int64."""
    there, wanted = config.pooling.split("+"), pooling.split("+")
    starts = [
        (config.route_layers.index(layer) * len(there) + there.index(part)) * d_model for layer in layers for part in wanted
    ]
    return torch.cat([torch.arange(start, start + d_model) for start in starts])


def _widen(old: Router | Veto, new: Router | Veto, before: Tensor) -> None:
    """Load the old module into one that reads more columns; those that are new to it count nothing."""
    for name, value in old.state_dict().items():
        target = new.state_dict()[name]
        if name in FEATURE_WIDE:
            target.fill_(1.0 if name == "std" else 0.0)
            target[..., before] = value.to(target.device)
        else:
            target.copy_(value)
