"""What the gates of a server did, beside vLLM's own metrics at /metrics, and the drift watch over its prompts."""

from __future__ import annotations

import functools
import logging
from collections.abc import Hashable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from paving.controller.gates import CONFORMAL, Conformal
from paving.controller.residual_paving import ResidualPaving
from paving.serving.drift import LEVEL, WINDOW, Drift
from paving.serving.told import Told

log = logging.getLogger(__name__)
GATES = tuple(i / 10 for i in range(11))


class Meters(NamedTuple):
    requests: Any
    vetoes: Any
    abstentions: Any
    failures: Any
    gate: Any
    boundary: Any
    far: Any
    drifted: Any
    calibration: Any


@functools.cache
def meters() -> Meters:
    """In prometheus_client's registry, as vLLM's are; once in a process."""
    from prometheus_client import Counter, Gauge, Histogram

    def gauge(name: str, what: str, labels: tuple[str, ...] = ()) -> Any:
        return Gauge(name, what, labels, multiprocess_mode="mostrecent")

    return Meters(
        requests=Counter("paving:requests", "Requests by policy and by whether their gate opened.", ("policy", "gate")),
        vetoes=Counter("paving:vetoes", "Gates that the veto closed, which would have opened."),
        abstentions=Counter("paving:abstentions", "Gates of a conformal policy that abstained."),
        failures=Counter("paving:gate_failures", "Gates that could not be decided and stayed closed."),
        gate=Histogram("paving:gate", "Gates as they were applied; 0 is closed.", buckets=GATES),
        boundary=Histogram(
            "paving:boundary",
            "Size of prompts' standardised boundary features; about 1 for those the router was fitted on.",
            buckets=(0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0),
        ),
        far=gauge("paving:far_ratio", f"Share of recent prompts farther off than {1 - LEVEL:.0%} of calibration's."),
        drifted=gauge("paving:drift", "1 where recent prompts are unlike calibration's, so that its promise says nothing."),
        calibration=gauge(
            "paving:calibration_open_ratio", "Share of calibration's groups whose gate opens, before any veto.", ("bucket",)
        ),
    )


class Watch:
    """Counts the decisions of one controller."""

    def __init__(self, controller: ResidualPaving, *, promised: bool = False):
        self.controller, self.promised = controller, promised
        self.meters = meters()
        self.drift = _drift(controller)
        self._recent: dict[int, None] = {}  # hashes of the prompts in the drift watch's window, oldest first
        self._warned = False
        for bucket, share in calibration_open(controller).items():
            self.meters.calibration.labels(bucket).set(share)

    def count(self, told: Told, *, prompt: Hashable | None = None) -> None:
        """prompt: by which a repeated one is known, that says nothing new of where prompts lie."""
        kind, _, alpha = told.policy.partition(":")  # a label's values must be few, and users choose alpha
        self.meters.requests.labels(kind, "open" if told.gate > 0 else "closed").inc()
        if told.failed:
            self.meters.failures.inc()
        if told.veto and told.logit is not None and self._would_open(told.policy, told.logit):
            self.meters.vetoes.inc()
        if told.logit is None:
            return  # asked to be closed: nothing was decided, and no prompt looked at
        self.meters.gate.observe(told.gate)
        if kind == CONFORMAL and self.controller.reference.verdict(told.logit, float(alpha)) == "abstain":
            self.meters.abstentions.inc()
        if told.boundary is not None:
            self.meters.boundary.observe(told.boundary)
            if self.drift is not None and (prompt is None or self._is_new(hash(prompt))):
                self._watch(told.boundary)

    def _would_open(self, policy: str, logit: float) -> bool:
        named = self.controller.policy_named(policy)
        if self.promised and isinstance(named, Conformal):
            named = replace(named, threshold=max(named.threshold, self.controller.threshold))  # as served.asked_for has it
        return bool(named.gate(torch.tensor([logit]), None) > 0)

    def _is_new(self, prompt: int) -> bool:
        known = prompt in self._recent
        self._recent.pop(prompt, None)
        self._recent[prompt] = None
        if len(self._recent) > WINDOW:
            del self._recent[next(iter(self._recent))]
        return not known

    def _watch(self, boundary: float) -> None:
        self.drift.seen(boundary)
        drifted = self.drift.drifted
        self.meters.far.set(self.drift.far / self.drift.n)
        self.meters.drifted.set(drifted)
        if drifted and not self._warned:
            log.warning(
                "paving: of the last %d prompts %d lie farther off than %.0f %% of the calibration's (chance %.1e): what is "
                "promised of the gate is promised for prompts like the calibration's, and not for these",
                self.drift.n, self.drift.far, 100 * (1 - LEVEL), self.drift.chance,
            )  # fmt: skip
        self._warned = drifted


def calibration_open(controller: ResidualPaving) -> dict[str, float]:
    """Bucket -> share of calibration's groups whose gate opens under the controller's own policy, before any veto."""
    reference = controller.reference
    if reference is None:
        return {}
    logits = {b: getattr(reference, b) for b in ("edit", "benign_keep", "harmful_keep")}
    return {
        bucket: float((controller.policy.gate(torch.tensor(values), None) > 0).float().mean())
        for bucket, values in logits.items()
        if values
    }


def _drift(controller: ResidualPaving) -> Drift | None:
    known = () if controller.reference is None else controller.reference.boundary
    try:
        return Drift(known)
    except ValueError as error:
        log.warning("paving: no drift watch: %s", error)
        return None
