# Everything runs from a fresh machine with Python 3.11+, a C/C++ compiler, make and a package registry.
PYTHON ?= python3
PY := .venv/bin/python
MODEL := .cache/models/SmolLM2-135M-Instruct

# Without cached bytecode every one of many processes compiles SGLang anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test check layers lint format bench eval eval-quick pictures lock clean
.PHONY: sanitize arm64 fuzz chaos

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## virtual environment, pinned packages, the project, the demo model
	@$(PYTHON) tools/setup.py

demo: setup  ## 1 prefill + 1 decode + router on a real model; shows what was shared (ARGS=--keep ...)
	@$(PY) -m sglang_memserve.demo --model-path $(MODEL) $(ARGS)

test: setup  ## all tests, quick ones first (ARGS="-k name" ...)
	@$(PY) -m pytest $(ARGS)

check: setup  ## ruff, formatting, types, import layers
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) tools/typecheck.py
	@$(PY) -m pytest -q test/architecture

sanitize: setup  ## contract tests of the native code under AddressSanitizer and UBSan
	@$(PY) tools/sanitize.py $(ARGS)

arm64: setup  ## compile the kernels for 64-bit ARM, with a compiler from the registry
	@$(PY) tools/arm64.py

fuzz: setup  ## the random tests again and again with new cases, until one fails (ROUNDS=10)
	@for round in $$(seq $(or $(ROUNDS),10)); do \
		echo "round $$round"; env -u CI $(PY) -m pytest -q test/property $(ARGS) || exit 1; done

chaos: setup  ## random kills, freezes and restarts: simulated, then a real cluster (SEEDS=40)
	@MEMSERVE_CHAOS=$(or $(SEEDS),40) $(PY) -m pytest -q -rA \
		test/simulation/test_router_chaos.py test/integration/test_chaos.py $(ARGS)

lint: setup  ## ruff with its safe fixes
	@$(PY) -m ruff check --fix .

format: setup  ## ruff format
	@$(PY) -m ruff format .

bench: setup  ## the benchmarks (minutes; writes benchmark/results)
	@$(PY) -m benchmark.harness $(ARGS)

eval-quick: setup  ## a reduced evaluation in less than ten minutes: pool, no pool, stock instances
	@$(PY) -m benchmark.evaluation --quick $(ARGS)

eval: setup  ## the whole evaluation, three hours (ARGS="--peer-router PYTHON --data DIR ...")
	@$(PY) -m benchmark.evaluation $(ARGS)
	@$(PY) -m benchmark.pictures

pictures: setup  ## the figures of docs/evaluation.md from benchmark/results
	@$(PY) -m benchmark.pictures

lock:  ## resolve requirements/lock.txt again from pyproject.toml, keeping what still fits
	@$(PY) tools/lock.py $(ARGS)

clean:  ## remove the environment, caches and built files
	rm -rf .venv .cache build dist python/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
