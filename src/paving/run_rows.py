"""The rows of a run's table: the deployed controller, and the same experts under other gates and mixtures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from paving.controller.gates import GatePolicy, Oracle
from paving.controller.residual_paving import ResidualPaving
from paving.controller.store import checked_mixture
from paving.evaluation.three_way import RowSpec
from paving.traces.store import TraceStore


def row_specs(
    controller: ResidualPaving, policies: Sequence[str], folder: Path, mixtures: Sequence[str] = ()
) -> list[RowSpec]:
    """learned, learned+veto, oracle, and one row a further policy (`soft`, `soft+veto`) or mixture (`uniform`, `expert:0`).

    All share experts and scale. A mixture's row keeps the deployed gate and veto, and changes nothing else.
    """
    fingerprint = TraceStore.key(weights=digest(folder / "controller" / "controller.safetensors"))
    has_veto = bool(controller.weights.veto.fitted)
    variants = [(controller.with_policy(controller.policy, name="learned", use_veto=False), "learned")]
    if has_veto:
        variants.append((controller.with_policy(controller.policy, name="learned+veto", use_veto=True), "learned"))
    for row in dict.fromkeys(policies):
        policy, use_veto = row_policy(row, controller, has_veto)
        if policy.name == Oracle().name or (policy.name == controller.policy.name and not use_veto):
            continue  # stands in the table anyway, as oracle or learned
        kind = "learned" if policy.vetoable else "diagnostic"
        variants.append((controller.with_policy(policy, name=row, use_veto=use_veto), kind))
    for row in dict.fromkeys(mixtures):
        mixed = controller.with_mixture(checked_mixture(row, controller.config.n_experts))
        variants.append((replace(mixed, name=row), "diagnostic"))
    variants.append((controller.with_policy(Oracle(), name="oracle"), "diagnostic"))
    return [
        RowSpec(
            intervention=c,
            kind=kind,
            policy=c.policy.name,
            scale=c.scale,
            key=f"{fingerprint}/{c.policy!r}/{c.scale}/{c.use_veto}/{c.mixture!r}",
            editor=f"{fingerprint}/{c.scale}",
        )
        for c, kind in variants
    ]


def row_policy(row: str, controller: ResidualPaving, has_veto: bool) -> tuple[GatePolicy, bool]:
    """`soft` or `soft+veto` -> the gate policy at the run's threshold, and whether the veto may close its gates.

    raises ValueError for a policy that is not known, and for a veto where there is none to apply.
    """
    name = row.removesuffix("+veto")
    policy, use_veto = controller.policy_named(name), name != row
    if use_veto and not policy.vetoable:
        raise ValueError(f"{row}: no veto goes with the {name} gate; it goes with soft, hard, thresholded, conformal:ALPHA.")
    if use_veto and not has_veto:
        raise ValueError(f"{row}: this controller has no fitted veto. Leave out +veto.")
    return policy, use_veto


def digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
