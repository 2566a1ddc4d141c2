"""A circuit run: find the circuit of a category, edit its weights, choose α, measure from every side.

from paving.circuit_run import CircuitConfig, edit, evaluate, find
from paving.run import Means

means = Means.default()
config = CircuitConfig.of_recipe("selective", pairs="pairs.jsonl", category="legal_opinion", held_out="test.jsonl")
find(config, folder, means)
edit(folder, means)
evaluate(folder, means, against=["inverse", "random"])
utility(folder, ["gsm8k"], means)
"""

from .config import CircuitConfig, StrengthConfig
from .evaluate import evaluate
from .stages import edit, find
from .utility import utility

__all__ = ["CircuitConfig", "StrengthConfig", "edit", "evaluate", "find", "utility"]
