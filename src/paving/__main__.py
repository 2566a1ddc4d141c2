"""`python -m paving ...`, and so `accelerate launch ... -m paving ...`."""

from paving.cli import app

app()
