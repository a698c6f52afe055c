# Two commands do everything on a fresh machine: `make train` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Processes of the tests. One more than two cores: some tests wait for processes that they have started.
PROCESSES ?= 3

.PHONY: install dev train test test-all lint style imports types bench docs clean

install: $(VENV)/.installed

# The constraints file pins what was tested; without it an unpinned torch may be a multi-gigabyte build.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "kfacore needs Python 3.11 or newer, found %s" % sys.version.split()[0])'
	@echo 'installing into $(VENV): torch and what it needs are a large download, minutes on a slow line'
	$(PYTHON) -m venv $(VENV)
	@echo 'installed: Python environment (1 of 3)'
	$(PIP) hatchling editables
	@echo 'installed: build tools (2 of 3)'
	$(PIP) --no-build-isolation --editable .
	@echo 'installed: kfacore (3 of 3)'
	touch $@

# What tests, linters and benchmarks need besides.
dev: $(VENV)/.developed

$(VENV)/.developed: $(VENV)/.installed
	@echo 'installing what tests need: a minute or two more'
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@

train: install
	$(BIN)/kfac train --problem curves --approx tridiag --steps 300

lint: style imports types

style: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

imports: dev
	$(BIN)/lint-imports --no-cache

types: dev
	$(BIN)/mypy

# A file of tests stays in one process, which makes its shared fixtures once, and the long ones come first (conftest.py).
# More threads would only wait on each other.
test: dev
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder

# Also the tests marked slow, and 1,000 examples of each fuzz test in place of 60.
test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder --all

# Sphinx is not needed by `make test`; a test builds the docs too where it is there.
docs: $(VENV)/.documented
	$(BIN)/python docs/figures/tables.py
	$(BIN)/python tests/configuration_keys.py
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/docs
	@echo 'open build/docs/index.html'

$(VENV)/.documented: $(VENV)/.developed
	$(PIP) --no-build-isolation --editable '.[docs]'
	touch $@

bench: dev
	$(BIN)/python -m benchmarks all

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
