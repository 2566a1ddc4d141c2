"""`python -m paving ...`, and so `torchrun ... -m paving ...`."""

from paving.cli import app

app()
