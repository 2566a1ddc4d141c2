"""Comparators on a run's own prompts: fitted, swept, chosen by rules and measured beside Residual Paving."""

from paving.compare.comparison import compare
from paving.compare.methods import METHODS, SCALES, VARIANTS, Method

__all__ = ["METHODS", "SCALES", "VARIANTS", "Method", "compare"]
