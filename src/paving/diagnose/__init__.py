"""`paving diagnose RUN`: why a run's numbers are what they are."""

from paving.diagnose.cells import Grid
from paving.diagnose.story import DEFAULT_PARTS, PARTS, Options, diagnose
from paving.diagnose.study import FILE

__all__ = ["DEFAULT_PARTS", "FILE", "PARTS", "Grid", "Options", "diagnose"]
