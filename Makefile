SHELL := /bin/bash
PYTHON := .venv/bin/python
STAMP := .venv/.installed
# The platform that .venv was made for stays: make never turns a TPU or GPU environment into a CPU one.
PLATFORM ?= $(or $(shell cut -d ' ' -f 1 $(STAMP) 2>/dev/null),cpu)

.DEFAULT_GOAL := help
.PHONY: help demo demo-smollm2 check test-fast test test-slow bench fit fit-table clean

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.* ## ' Makefile | sed -E 's/:.* ## /\t/' | expand -t 14

demo: $(STAMP) ## distil a student on real text, beside one trained without a teacher
	$(PYTHON) scripts/demo/run.py

demo-smollm2: $(STAMP) ## distil a published model, in many ways: make demo-smollm2 ARGS="--hf HuggingFaceTB/SmolLM2-135M"
	$(PYTHON) scripts/demo/smollm2.py $(ARGS)

JOBS ?= 2
# A worker that has nothing left takes half of what another has. The slowest tests are listed at the end.
PYTEST := $(PYTHON) -m pytest -n $(JOBS) --dist worksteal --durations=20
# Where an image forbids Python to keep what it has compiled, each import of the engine takes three times as long.
unexport PYTHONDONTWRITEBYTECODE
check: $(STAMP) ## lint, format, types: before every commit
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test-fast: $(STAMP) ## the tests that start no run
	$(PYTEST) -m "not e2e and not slow"

test: $(STAMP) ## every test but the long matrix, JOBS at a time
	$(PYTEST) -m "not slow"

test-slow: $(STAMP) ## the long matrix, and the loss compiled as users have it
	$(PYTEST) -m slow
	XLA_FLAGS= $(PYTEST) -m "not slow" tests/distill/test_blockwise.py

bench: $(STAMP) ## measure the distillation step
	$(PYTHON) scripts/benchmark_kd.py

CONFIG ?= configs/smoke.yml
TOPOLOGY ?= v5e-16
SLICES ?= 1
fit: $(STAMP) ## compile the step for a TPU: make fit CONFIG=my.yml TOPOLOGY=v5e-16 ARGS="key=value ..."
	$(PYTHON) MaxText/train_compile.py $(CONFIG) compile_topology=$(TOPOLOGY) compile_topology_num_slices=$(SLICES) $(ARGS)

fit-table: $(STAMP) ## compile recipes, and write their costs into them and README: make fit-table ARGS="configs/my.yml ..."
	$(PYTHON) scripts/fit_table.py $(ARGS)

clean: ## remove what the demo and the runs wrote
	rm -rf runs

$(STAMP): requirements.txt requirements-tpu.txt requirements-gpu.txt pyproject.toml
	bash setup.sh $(PLATFORM)
