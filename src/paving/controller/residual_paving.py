"""Residual Paving at inference (algorithm 1), as an intervention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from paving.backbone import Backbone, BackboneError, PromptBatch
from paving.backbone.fingerprint import outdated
from paving.backbone.hooks import around_passes, edit_residuals
from paving.controller.config import ControllerConfig
from paving.controller.conformal import Reference
from paving.controller.gates import CONFORMAL, GatePolicy, MixturePolicy, RouterMixture, ThresholdedSoft, gate_policy
from paving.controller.weights import ControllerWeights, Edit
from paving.intervention import RowState
from paving.traces.boundary import boundary_states
from paving.traces.prefill import can_run_again, drop_past, keep_past, last_token_again


@dataclass(frozen=True)
class Decision:
    """What the controller decided for n rows: gate and logit (n,), mixture (n, K), vetoed (n,) bool or None."""

    gate: Tensor
    logit: Tensor
    mixture: Tensor
    vetoed: Tensor | None

    def rows(self) -> tuple[RowState, ...]:
        gates, logits, mixtures = self.gate.tolist(), self.logit.tolist(), self.mixture.tolist()
        vetoed = [None] * len(gates) if self.vetoed is None else self.vetoed.tolist()
        return tuple(
            RowState(gate=g, logit=a, veto=v, mixture=tuple(m))
            for g, a, v, m in zip(gates, logits, vetoed, mixtures, strict=True)
        )


@dataclass(frozen=True)
class ResidualPaving:
    """A routed residual controller for one backbone.

    policy    how the gate follows from the router's logit
    scale     s in eq. 2
    use_veto  whether the harmful-keep veto may close a gate (policies that ignore it: oracle, closed, open)
    reference gate logits of calibration prompts, for p-values; None where none were kept
    objectives  two: fitted without harmful keeps, to be measured beside others and not used
    """

    name: str
    config: ControllerConfig
    weights: ControllerWeights
    base_name: str
    base_fingerprint: str
    policy: GatePolicy = field(default_factory=ThresholdedSoft)
    mixture: MixturePolicy = field(default_factory=RouterMixture)
    scale: float = 8.0
    use_veto: bool = False
    reference: Reference | None = None
    objectives: Literal["two", "three"] = "three"

    @property
    def threshold(self) -> float:
        """The calibrated one, of the policies that have one; 0 under a policy that knows none."""
        return getattr(self.policy, "calibrated", getattr(self.policy, "threshold", 0.0))

    def policy_named(self, name: str, threshold: float | None = None) -> GatePolicy:
        """The policy that a user names, at `threshold` or the calibrated one; `conformal:ALPHA` where there is a reference.

        raises ValueError for a name that is not known, and where the calibration cannot show that alpha
        """
        threshold = self.threshold if threshold is None else threshold
        kind, colon, alpha = name.partition(":")
        if not (colon and kind == CONFORMAL):
            try:
                return gate_policy(name, threshold)
            except ValueError as error:
                raise ValueError(f"{str(error).removesuffix('.')}, {CONFORMAL}:ALPHA.") from None
        if self.reference is None:
            raise ValueError(
                f"{name}: this controller was made before calibration logits were kept. Train, or search for the gate, "
                "again in a new folder."
            )
        try:
            level = float(alpha)
        except ValueError:
            raise ValueError(f"{name}: {alpha!r} is no number; write for example {CONFORMAL}:0.05.") from None
        return replace(self.reference.policy(level), calibrated=threshold)

    def with_policy(self, policy: GatePolicy, *, name: str | None = None, use_veto: bool | None = None):
        return replace(
            self,
            policy=policy,
            name=name or policy.name,
            use_veto=self.use_veto if use_veto is None else use_veto,
        )

    def with_scale(self, scale: float):
        return replace(self, scale=scale)

    def with_mixture(self, mixture: MixturePolicy):
        return replace(self, mixture=mixture)

    def check(self, backbone: Backbone) -> None:
        """raises BackboneError if this controller was trained for another base."""
        if backbone.fingerprint != self.base_fingerprint:
            raise BackboneError(
                f"this controller was trained for {self.base_name} (fingerprint {self.base_fingerprint}), "
                f"but the model at hand is {backbone.name} (fingerprint {backbone.fingerprint}). "
                f"Load {self.base_name}, or train a controller for {backbone.name}.{outdated(self.base_fingerprint)}"
            )

    @contextmanager
    def apply(self, backbone: Backbone, batch: PromptBatch, *, start: int = 0) -> Iterator[PavedBatch]:
        """Edit the generation positions of this batch's forward passes: the last prompt token and all after it.

        start: columns of the prompt that are in the KV cache already when the first pass begins
        """
        self.check(backbone)
        run = PavedBatch(self, backbone, batch, start)
        if start and not (self.config.reads_before_it_edits and self.config.pooling == "last"):
            # The states of the cached columns are gone, and with them what the router would have to read.
            raise ValueError(
                "route layers at or above edit layers, and mean pooling, need the whole prompt at once: "
                "start without a KV cache."
            )
        with run.attached():
            yield run

    def decide(self, z: Tensor, batch: PromptBatch) -> Decision:
        """Boundary features (n, n_features) -> gate, mixture and veto of each row. A learned gate stays closed where its
        logit is not finite; the row's state shows that logit."""
        with torch.no_grad():
            logit, mixture = self.weights.route(z)
            gate = self.policy.gate(logit, batch)
            if self.policy.vetoable:  # a learned one: from a logit that is no number nothing can be decided
                gate = torch.where(logit.isfinite(), gate, torch.zeros_like(gate))
            vetoed = None
            if self.use_veto and self.policy.vetoable:
                vetoed = self.weights.veto(self.weights.router.normalise(z)) > self.weights.veto.threshold
                gate = gate * ~vetoed
            return Decision(gate, logit, self.mixture.mix(mixture), vetoed)


class PavedBatch:
    """One entry of `apply`: reads the prompt as it passes by, decides once, edits what follows. Applied."""

    def __init__(self, controller: ResidualPaving, backbone: Backbone, batch: PromptBatch, start: int):
        self.controller = controller
        self.batch = batch
        self.columns = start  # of the batch, those that the cache of the current pass holds already
        self._beside: int | None = None  # what a cache holds that is none of the batch's: an adapter's virtual tokens
        self.decision: Decision | None = None
        self.edits: dict[int, Edit] = {}
        self._backbone = backbone
        self._read: dict[int, Tensor] = {}
        self._sums: dict[int, Tensor] = {}  # mean pooling: what earlier passes over the prompt add up to
        self._features: Tensor | None = None  # what the decision was taken from
        self._first = 0  # first column to edit in the current pass, counted from the pass's own start
        self._open: Tensor | None = None  # rows with an open gate; None where every row is open
        self._hooked = sorted({*controller.config.route_layers, *controller.config.edit_layers})
        self._edited = set(controller.config.edit_layers)
        self._late = not controller.config.reads_before_it_edits
        self._only_reads = False  # late routing: this pass over the prompt is not edited; its last token is run again
        self._kept_past = ()  # layers of the cache whose window holds on to what it would drop, for that
        self._aside = False  # a pass of our own, beside the caller's
        self._within = False  # a pass whose arguments have been seen

    def rows(self) -> tuple[RowState, ...]:
        if self.decision is None and self._late:
            self._decide_aside()
        if self.decision is None:
            raise RuntimeError("no gate was decided yet: run the model over the prompt inside `apply` first.")
        return self.decision.rows()

    @contextmanager
    def attached(self) -> Iterator[None]:
        hooks = {layer: self._hook(layer) for layer in self._hooked}
        try:
            with edit_residuals(self._backbone, hooks), around_passes(self._backbone, self._before_pass, self._after_pass):
                yield
        finally:
            self.edits.clear()

    def _before_pass(self, arguments: Mapping[str, Any]) -> None:
        """Where the pass begins, and where a route layer stands at or above an edited one: how the gates are decided.

        Prompt states before the last token are the base's at every depth. So a prefill runs unedited, decides, and only
        its last token is run again, for the rows whose gate is open. A pass without a cache that could take the token
        back, or over more than the prompt, is preceded by one over the prompt alone.
        """
        if self._aside:
            return
        self._within = True
        cache = arguments.get("past_key_values")
        held = 0 if cache is None else int(cache.get_seq_length())
        if self._beside is None:
            self._beside = held - self.columns
        self.columns = max(0, held - self._beside)
        if self._late and self.decision is None:
            columns = _columns_of(arguments)
            within_the_prompt = columns is not None and self.columns + columns <= self.batch.width
            self._only_reads = within_the_prompt and can_run_again(self._backbone, arguments)
            if self._only_reads:
                self._kept_past = keep_past(arguments)
            else:
                self._decide_aside()

    def _decide_aside(self) -> None:
        self._aside = True
        try:
            self.decide(boundary_features(self._backbone, self.batch, self.controller.config))
        finally:
            self._aside = False

    def _after_pass(self, arguments: Mapping[str, Any], output: Any) -> Any | None:
        if self._aside:
            return None
        self._within = False
        if not self._only_reads:
            return None
        self._only_reads = False
        if self.decision is None or not self.edits:  # a part of the prompt, or every gate is closed
            drop_past(self._kept_past)
            return None
        return last_token_again(self._backbone, arguments, output, self.decision.gate > 0, self._kept_past)

    def _hook(self, layer: int) -> Edit:
        first, is_edit = layer == self._hooked[0], layer in self._edited
        is_route = layer in self.controller.config.route_layers

        def hook(resid: Tensor) -> Tensor | None:
            if self._aside:
                return None
            if first:
                self._begin_pass(resid)
            if self.decision is None and is_route and (self._only_reads or not self._late):
                self._collect(layer, resid)
            if not is_edit or self._only_reads or not self.edits or self._first >= resid.shape[1]:
                return None  # skipped rather than multiplied by a zero gate: a closed gate leaves the base's bits
            return self._edit(layer, resid)

        return hook

    def _begin_pass(self, resid: Tensor) -> None:
        if not self._within:
            raise RuntimeError(
                f"the blocks of {self._backbone.name} were run past its decoder ({type(self._backbone.model).__name__}."
                "get_decoder()), so that it is not known where in the prompt the pass begins. Run the model, or its decoder."
            )
        self._first = max(0, self.batch.width - 1 - self.columns)
        if self.decision is not None and len(resid) != len(self.decision.gate):
            # Decided before this pass (late routing), and now several samples a prompt: the gates follow their rows.
            self.decide(_expand(self._features, len(resid)))

    def _collect(self, layer: int, resid: Tensor) -> None:
        """Add this pass's part of the boundary feature; decide once the last route layer has seen the last column."""
        last = self.batch.width - 1 - self.columns
        config = self.controller.config
        mask = _expand(self.batch.attention_mask, resid.shape[0])
        if "mean" in config.pooling:
            # A pass may go on beyond the prompt, over forced tokens; the router reads the prompt alone.
            prompt = mask[:, self.columns : self.columns + resid.shape[1], None]
            part = (resid[:, : prompt.shape[1]].float() * prompt).sum(1)
            self._sums[layer] = self._sums[layer] + part if layer in self._sums else part
        if last >= resid.shape[1]:
            return
        parts = [resid[:, last].float()] if "last" in config.pooling else []
        if "mean" in config.pooling:
            parts.append(self._sums.pop(layer) / mask.sum(1, keepdim=True))
        self._read[layer] = torch.cat(parts, dim=1)
        if layer == max(config.route_layers):
            self.decide(torch.cat([self._read.pop(r) for r in config.route_layers], dim=1))

    def decide(self, z: Tensor) -> None:
        batch = self.batch
        self._features = z
        if len(z) != len(batch):  # several samples per prompt: each row follows its prompt
            times = len(z) // len(batch)
            batch = replace(
                batch,
                ids=tuple(i for i in batch.ids for _ in range(times)),
                bucket=tuple(b for b in batch.bucket for _ in range(times)),
            )
        self.decision = decision = self.controller.decide(z, batch)
        is_open = decision.gate > 0
        if not bool(is_open.any()):
            return
        self._open = None if bool(is_open.all()) else is_open.nonzero().squeeze(-1)
        strength = self.controller.scale * decision.gate[:, None] * decision.mixture
        with torch.no_grad():
            self.edits = self.controller.weights.experts.edits(strength[is_open], self._backbone.dtype)

    def _edit(self, layer: int, resid: Tensor) -> Tensor | None:
        edit = self.edits.get(layer)
        if edit is None:
            return None
        if self._open is None and self._first == 0:
            return edit(resid)
        rows = slice(None) if self._open is None else self._open
        edited = resid.clone()  # the base's own tensor may be held by a recorder
        edited[rows, self._first :] = edit(resid[rows, self._first :])
        return edited


def boundary_features(backbone: Backbone, batch: PromptBatch, config: ControllerConfig) -> Tensor:
    """(n, n_features) float32, from one unedited pass over the prompts."""
    return boundary_states(backbone, batch, config.route_layers, config.pooling)


def _columns_of(arguments: Mapping[str, Any]) -> int | None:
    given = next((arguments[k] for k in ("input_ids", "inputs_embeds") if arguments.get(k) is not None), None)
    return None if given is None else given.shape[1]


def _expand(rows: Tensor, n: int) -> Tensor:
    return rows if len(rows) == n else rows.repeat_interleave(n // len(rows), dim=0)
