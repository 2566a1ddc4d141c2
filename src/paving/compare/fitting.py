"""A comparator that is fitted when first asked to edit: not at all where everything it would answer is on disk."""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from paving.backbone import Backbone, BackboneError, PromptBatch
from paving.compare.bench import Bench
from paving.compare.methods import OWN_ROUTING, Method, Noted
from paving.intervention import RowState
from paving.steering.checks import SteeringError
from paving.steering.routing import Global
from paving.steering.steered import Editor, Routing, Steered


class Fitting:
    """One method on one bench."""

    def __init__(self, method: Method, bench: Bench):
        self.method, self.bench = method, bench

    @property
    def editor(self) -> Editor:
        return self._fitted.editor

    @property
    def note(self) -> str:
        """Of this fit, beside the method's own."""
        return self._fitted.note

    @cached_property
    def _fitted(self) -> Noted:
        stored, path = self.method.stored, self.bench.fits / f"{self.key}.safetensors"
        if stored is not None and path.exists():
            with suppress(SteeringError, BackboneError):  # damaged: fitted again
                return Noted(stored.load(path, self.bench.backbone), "")
        self.bench.means.say(f"fitting {self.method.name}")
        with torch.enable_grad():  # whoever asks first may be measuring, without gradients
            found = self.method.fit(self.bench.workshop)
        if stored is not None:
            try:
                stored.save(found, path)
            except SteeringError as error:  # a full disk costs a fit after a kill, and not this one
                self.bench.means.say(f"the fit of {self.method.name} is not kept: {error}")
        return found if isinstance(found, Noted) else Noted(found, "")

    def forget(self) -> None:
        """Remove what was kept of the fit: it may be as large as the base."""
        (self.bench.fits / f"{self.key}.safetensors").unlink(missing_ok=True)

    @cached_property
    def key(self) -> str:
        """Names the fitted editor without fitting it."""
        return self.bench.fit_key(method=self.method.name, version=self.method.version)

    def routing(self, variant: str) -> Routing:
        return _Own(self) if variant == OWN_ROUTING else _Shared(self.bench, variant)

    def at(self, scale: float, variant: str | None = None) -> Steered:
        """The method at a scale, under one of its variants; None: every gate open."""
        routing = Global() if variant is None else self.routing(variant)
        backbone = self.bench.backbone
        name = row_name(self.method.name, scale, routing.name)
        return Steered(name, _Deferred(self), routing, scale, backbone.name, backbone.fingerprint)


def row_name(method: str, scale: float, variant: str) -> str:
    """`dim-ablation@0.5_probe+veto`: as it stands in tables, and in file names."""
    return f"{method}@{scale:g}_{variant}"


@dataclass(frozen=True)
class _Deferred:
    fitting: Fitting

    def editing(self, backbone: Backbone, batch: PromptBatch, strength: Tensor) -> AbstractContextManager[None]:
        return self.fitting.editor.editing(backbone, batch, strength)


@dataclass(frozen=True)
class _Shared:
    """A routing that all methods share: the probe, for one, is fitted when it is first asked."""

    bench: Bench
    name: str

    def route(self, backbone: Backbone, batch: PromptBatch) -> tuple[RowState, ...]:
        return self.bench.routing(self.name).route(backbone, batch)


@dataclass(frozen=True)
class _Own:
    """The routing that belongs to the method itself."""

    fitting: Fitting
    name: str = OWN_ROUTING

    def route(self, backbone: Backbone, batch: PromptBatch) -> tuple[RowState, ...]:
        return self.fitting.method.own(self.fitting.editor).route(backbone, batch)
