"""The controller of an engine: decides once a request, edits its rows step by step, forgets it when it is gone.

No engine is imported here: a step is spans (serving.steps), and layers hand in their output. What goes wrong while a gate is
decided closes that request's gate. What goes wrong at a layer, where all are edited at once, breaks the step's requests with
open gates: half edited, they would be neither the base's nor the controller's, so the engine ends them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from paving.backbone import PromptBatch
from paving.controller.gates import Conformal, Soft
from paving.controller.residual_paving import ResidualPaving
from paving.controller.weights import Edit
from paving.intervention import RowState
from paving.prompts.types import Bucket
from paving.serving.steps import Span
from paving.serving.told import Told

log = logging.getLogger(__name__)
CLOSED = RowState(gate=0.0)
DEFAULT = "default"
POLICIES = ("soft", "hard", "thresholded", "closed")  # any request may ask for these, or conformal:ALPHA
DIAGNOSTICS = ("oracle", "open")  # and where the server was started for measuring, for these


@dataclass(frozen=True)
class Asked:
    """What a request says of its gate. bucket and veto are for measuring alone, where the server allows that.

    policy  None: the controller's own
    bucket  the prompt's true one, which the oracle reads
    veto    whether the veto may close the gate; None: as the controller has it
    """

    policy: str | None = None
    bucket: str | None = None
    veto: bool | None = None


NOTHING = Asked()


@dataclass
class Request:
    """What is known of one request: its controller, what the router has read so far, and the decision, once taken.

    controller  the server's, under the policy that was asked for
    batch       of this one prompt, with its bucket where the oracle was asked for
    strength    (K,) float32, scale · gate · mixture; None where the gate is closed
    told        whether `tell` has said it
    """

    controller: ResidualPaving
    batch: PromptBatch
    sums: dict[int, Tensor] = field(default_factory=dict)  # mean pooling: layer -> (d_model,) over the prompt so far
    read: int = 0  # prompt tokens that went into them
    state: RowState | None = None
    strength: Tensor | None = None
    boundary: float | None = None
    told: bool = False


class Served:
    """A controller and the requests under way. One for each worker; a step at a time.

    with each step: `begin`, the model's pass with `after_layer` behind every layer of `layers`, and, where `again` is True
    then, the same pass once more: route layers at or above edit layers decide in the first and edit in the second.
    """

    def __init__(
        self,
        controller: ResidualPaving,
        *,
        device: torch.device,
        dtype: torch.dtype,
        diagnostics: bool = False,
        promised: bool = False,
    ):
        self.controller = controller
        self._rules = {"diagnostics": diagnostics, "promised": promised}
        self.dtype = dtype
        controller.weights.eval().requires_grad_(False).to(device)
        config = controller.config
        self.layers = tuple(sorted({*config.route_layers, *config.edit_layers}))
        self.requests: dict[str, Request] = {}
        self.again = False
        self._late = not config.reads_before_it_edits
        self._spans: tuple[Span, ...] = ()
        self._reads: list[Span] = []
        self._read: dict[int, Tensor] = {}
        self._rows: Tensor | None = None
        self._edits: dict[int, Edit] = {}
        self._planned: list[tuple[Request, range]] = []  # what the edits were made for
        self._broken: set[str] = set()
        self.broke = False  # in the step under way

    def begin(self, spans: Sequence[Span], asked: Mapping[str, Asked]) -> None:
        """asked: request -> what its user asked for; nothing for one that is not in it."""
        self._spans, self.again, self.broke = tuple(spans), False, False
        for span in spans:
            if span.request not in self.requests:
                self.requests[span.request] = self._admitted(span, asked.get(span.request, NOTHING))
        undecided = [s for s in spans if self.requests[s.request].state is None]
        for span in undecided:
            request = self.requests[span.request]
            if span.position == 0:  # also a prompt that begins anew after preemption
                request.sums, request.read = {}, 0
            elif "mean" in self.controller.config.pooling and request.read != span.position:
                log.error("paving: %s begins inside its prompt; its gate stays closed", span.request)
                request.state = CLOSED
        self._reads = [s for s in undecided if self.requests[s.request].state is None]
        self._plan_edits()

    def after_layer(self, layer: int, hidden: Tensor, residual: Tensor) -> None:
        """hidden, residual: (rows, d_model), whose sum is the resid behind the layer. Rows of open gates are edited in
        place, all other rows keep their bits."""
        if layer in self.controller.config.route_layers and self._reads:
            self._collect(layer, hidden, residual)
        edit = self._edits.get(layer)
        if edit is None or self._rows is None:
            return
        if len(self._rows) == len(hidden):  # every row is open: nothing to gather and put back
            hidden.copy_(edit((hidden + residual)[:, None])[:, 0])
            residual.zero_()
            return
        resid = hidden[self._rows] + residual[self._rows]
        hidden[self._rows] = edit(resid[:, None])[:, 0]
        residual[self._rows] = 0

    def second_pass(self) -> None:
        """Between the two passes of a step that `again` asks for: nothing more is read, the new gates edit."""
        self.again, self._reads = False, []
        self._plan_edits()

    def break_step(self) -> None:
        """After a failure outside a single gate's decision: what was being read goes on as the base's, its gate failed; what
        was being edited is broken. Rows of closed gates were not touched."""
        self.broke = True
        for span in self._spans:
            request = self.requests.get(span.request)
            if request is None or request.strength is not None:
                self._broken.add(span.request)
            if request is None:  # not even admitted
                continue
            read = span.last_prompt_row is not None or "mean" in self.controller.config.pooling
            if request.strength is not None or (request.state is None and read):
                request.state, request.strength = CLOSED, None
        self.again, self._reads, self._read, self._edits, self._rows, self._planned = False, [], {}, {}, None, []

    def names_of_step(self) -> list[str]:
        return [span.request for span in self._spans]

    def take_broken(self) -> list[str]:
        """The requests that are broken, once."""
        broken, self._broken = sorted(self._broken), set()
        return broken

    def tell(self, request: str) -> Told | None:
        """What was decided, once; None before, and ever after."""
        known = self.requests.get(request)
        if known is None or known.state is None or known.told:
            return None
        known.told = True
        policy = known.controller.policy.name
        failed = known.state.logit is None and policy != "closed"
        return Told(policy, **asdict(known.state), boundary=known.boundary, failed=failed)

    def told_of_step(self) -> dict[str, Told]:
        """Request -> what `tell` has to say of those in the step that is under way."""
        found = {span.request: self.tell(span.request) for span in self._spans}
        return {request: told for request, told in found.items() if told is not None}

    def finish(self, requests: Iterable[str]) -> None:
        for name in requests:
            self.requests.pop(name, None)
            self._broken.discard(name)

    def _admitted(self, span: Span, asked: Asked) -> Request:
        nobody = torch.zeros(1, 0, dtype=torch.int64, device=self.controller.weights.veto.bias.device)
        try:
            controller = asked_for(self.controller, asked, **self._rules)
        except ValueError as error:  # the front end has refused it already; whatever came through stays closed
            log.error("paving: %s: %s", span.request, error)
            return Request(self.controller, PromptBatch(nobody, nobody, (span.request,), (None,)), state=CLOSED)
        bucket = None if asked.bucket is None else Bucket(asked.bucket)
        batch = PromptBatch(nobody, nobody, (span.request,), (bucket,))
        return Request(controller, batch, state=CLOSED if controller.policy.name == "closed" else None)

    def _collect(self, layer: int, hidden: Tensor, residual: Tensor) -> None:
        config = self.controller.config
        if "mean" in config.pooling:
            for span in self._reads:
                rows = slice(span.prompt_rows.start, span.prompt_rows.stop)
                part = (hidden[rows] + residual[rows]).float().sum(0)
                sums = self.requests[span.request].sums
                sums[layer] = sums[layer] + part if layer in sums else part
        whole = [s for s in self._reads if s.last_prompt_row is not None]
        if whole:
            rows = torch.tensor([s.last_prompt_row for s in whole], device=hidden.device)
            parts = [(hidden[rows] + residual[rows]).float()] if "last" in config.pooling else []
            if "mean" in config.pooling:
                parts.append(torch.stack([self.requests[s.request].sums[layer] / s.prompt for s in whole]))
            self._read[layer] = torch.cat(parts, dim=1)
        if layer == max(config.route_layers):
            for span in self._reads:
                self.requests[span.request].read += len(span.prompt_rows)
            self._decide(whole)

    def _decide(self, spans: Sequence[Span]) -> None:
        read, self._read = self._read, {}
        if not spans:
            return
        z = torch.cat([read[layer] for layer in self.controller.config.route_layers], dim=1)
        for i, span in enumerate(spans):
            request = self.requests[span.request]
            try:
                self._take(request, z[i : i + 1])
            except Exception:
                log.exception("paving: no gate could be decided for %s; it stays closed", span.request)
                request.state, request.strength = CLOSED, None
        is_open = any(self.requests[s.request].strength is not None for s in spans)
        if self._late:
            self.again = is_open
        elif is_open:
            self._plan_edits()

    def _take(self, request: Request, z: Tensor) -> None:
        decision = request.controller.decide(z, request.batch)
        state = decision.rows()[0]
        if not (math.isfinite(state.gate) and math.isfinite(state.logit)):
            raise ValueError(f"its gate is {state.gate}, its logit {state.logit}.")
        request.state, request.sums = state, {}
        boundary = float(self.controller.weights.unlikeness(z))
        request.boundary = boundary if math.isfinite(boundary) else None
        if request.state.gate > 0:
            request.strength = self.controller.scale * decision.gate[0] * decision.mixture[0]

    def _plan_edits(self) -> None:
        """The rows of all open gates in this step, and the experts weighed for each of them; those of the step before where
        the same requests have the same rows, as they do from one answer's token to the next."""
        opened = [(self.requests[s.request], s.edited_rows) for s in self._spans]
        opened = [(request, rows) for request, rows in opened if request.strength is not None and rows]
        if len(opened) == len(self._planned) and all(
            one is other and rows == earlier for (one, rows), (other, earlier) in zip(opened, self._planned, strict=True)
        ):
            return
        self._edits, self._rows, self._planned = {}, None, opened
        if opened:
            rows = [row for _, each in opened for row in each]
            strength = torch.cat([request.strength.expand(len(each), -1) for request, each in opened])
            self._rows = torch.tensor(rows, device=strength.device)
            with torch.no_grad():
                self._edits = self.controller.weights.experts.edits(strength, self.dtype)


def asked_for(
    controller: ResidualPaving, asked: Asked, *, diagnostics: bool = False, promised: bool = False
) -> ResidualPaving:
    """The controller under what a request asks for.

    diagnostics  whether it may ask for what is for measuring alone
    promised     whether calibration made a promise, which no request may then ask around

    raises ValueError for what a request may not ask for, naming what it may
    """
    name, measuring = asked.policy, asked.bucket is not None or asked.veto is not None
    if measuring and not diagnostics:
        raise ValueError("a bucket or veto goes with measuring; this server was not started with --allow-oracle.")
    buckets = [b.value for b in Bucket]  # a list: what a user sends may have no hash
    if asked.bucket not in [None, *buckets]:
        raise ValueError(f"bucket is {asked.bucket!r}, and none of {', '.join(buckets)}.")
    if asked.veto not in (None, True, False):
        raise ValueError(f"veto is {asked.veto!r}, neither 1 nor 0.")
    use_veto = controller.use_veto if asked.veto is None else bool(asked.veto)
    if use_veto and not bool(controller.weights.veto.fitted):
        raise ValueError("this controller has no fitted veto.")
    if name in (None, DEFAULT):
        return controller.with_policy(controller.policy, use_veto=use_veto)
    allowed = (*POLICIES, *(DIAGNOSTICS if diagnostics else ()))
    if not isinstance(name, str) or not (name in allowed or name.startswith("conformal:")):
        raise ValueError(f"policy {name!r} is none that a request may ask for; allowed: {DEFAULT}, {', '.join(allowed)}, "
                         "conformal:ALPHA.")  # fmt: skip
    if name == "oracle" and asked.bucket is None:
        raise ValueError(f"the oracle needs the prompt's bucket, one of {', '.join(buckets)}.")
    policy = controller.policy_named(name)
    if promised and not diagnostics:
        if isinstance(policy, Soft):
            raise ValueError("this controller makes a promise, and a soft gate, never quite closed, would break it.")
        if isinstance(policy, Conformal):  # alpha is the user's to choose, below what was promised it opens nothing
            policy = replace(policy, threshold=max(policy.threshold, controller.threshold))
    return controller.with_policy(policy, use_veto=use_veto)
