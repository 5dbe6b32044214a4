# Everything installs into .venv; `make demo` and `make test` work in a fresh clone with Python, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q
SOURCES := runtime adapters exporters edge cloud tests examples benchmarks

.PHONY: demo test test-slow lint format bench clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The edge install: no torch. This is all that serving and adapting need.
$(VENV)/.cpu: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[cpu]'
	touch $@

# torch is pinned to the release the lowering is tested with; the plain wheel would bring CUDA along.
$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(PIP) torch==2.13.0
	$(PIP) -e '.[cpu,export,dev]'
	touch $@

demo: $(VENV)/.cpu
	$(BIN)/tta-edge demo

test: $(VENV)/.dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow and not gpu' -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m 'slow and not gpu'

lint: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/edge_footprint.py

clean:
	rm -rf $(VENV) build dist out .mypy_cache .pytest_cache .ruff_cache .hypothesis
