# `make train` and `make test` set up everything they need in .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help setup torch train test test-slow lint types bench bench-gpu clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# The kernels are compiled by the installation.
$(READY): requirements.txt pyproject.toml hatch_build.py $(wildcard nmjax/kernels/*/src/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $(READY)

setup: $(READY)  ## make the virtual environment

torch: $(READY)  ## add PyTorch, which some tests compare with; they are skipped without it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[torch]'

train: $(READY)  ## the main job: compare methods on scikit-learn's digits (under 5 minutes)
	$(BIN)/python -m experiments.compare $(ARGS)

test: $(READY)  ## the default tests (under 10 minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

test-slow: $(READY)  ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(READY)  ## ruff
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(READY)  ## mypy
	$(BIN)/python -m mypy

bench: $(READY)  ## the benchmarks; writes experiments/benchmarks/results/*.json
	$(BIN)/python -m experiments.benchmarks.masks
	$(BIN)/python -m experiments.benchmarks.train_step
	$(BIN)/python -m experiments.benchmarks.blocks
	$(BIN)/python -m experiments.benchmarks.packed
	$(BIN)/python -m experiments.benchmarks.networks
	$(BIN)/python -m experiments.benchmarks.scaling
	$(BIN)/python -m experiments.benchmarks.large_model

bench-gpu: $(READY)  ## build, check and time 2:4 on an NVIDIA GPU (under 8 minutes)
	$(BIN)/python -m experiments.benchmarks.gpu

clean:  ## remove the environment and the caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
