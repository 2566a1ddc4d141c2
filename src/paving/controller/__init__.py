"""Residual Paving at inference: router, experts, gate policies, veto, oracle, save and load."""

from paving.controller.config import ControllerConfig
from paving.controller.conformal import PValues, Reference
from paving.controller.gates import (
    AlwaysOpen,
    Closed,
    Conformal,
    GatePolicy,
    Hard,
    Oracle,
    RouterMixture,
    SingleExpert,
    Soft,
    ThresholdedSoft,
    Uniform,
    WithoutExpert,
)
from paving.controller.paved_model import PavedModel, load_paved
from paving.controller.residual_paving import Decision, ResidualPaving
from paving.controller.store import ControllerError, fresh_controller, load_controller, save_controller

__all__ = [
    "AlwaysOpen",
    "Closed",
    "Conformal",
    "ControllerConfig",
    "ControllerError",
    "Decision",
    "GatePolicy",
    "Hard",
    "Oracle",
    "PValues",
    "PavedModel",
    "Reference",
    "ResidualPaving",
    "RouterMixture",
    "SingleExpert",
    "Soft",
    "ThresholdedSoft",
    "Uniform",
    "WithoutExpert",
    "fresh_controller",
    "load_controller",
    "load_paved",
    "save_controller",
]
