# Two commands do everything on a fresh machine: `make train` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: install train test suite test-all lint style types bench docs clean

install: $(VENV)/.installed

# The constraints file pins what was tested; without it an unpinned torch may be a multi-gigabyte build.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "kfacore needs Python 3.11 or newer, found %s" % sys.version.split()[0])'
	@echo 'installing into $(VENV): torch and what it needs are a large download, minutes on a slow line'
	$(PYTHON) -m venv $(VENV)
	@echo 'installed: Python environment (1 of 3)'
	$(BIN)/pip install --quiet --constraint constraints.txt hatchling editables
	@echo 'installed: build tools (2 of 3)'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@echo 'installed: kfacore with everything (3 of 3)'
	touch $@

train: install
	$(BIN)/kfac train --problem curves --approx tridiag --steps 300

lint: style types

style: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: install
	$(BIN)/mypy

# Types beside the tests: one of two cores would wait for them, most of a minute on a fresh checkout.
test: style
	$(MAKE) --no-print-directory --jobs 2 types suite

# A file of tests stays in one process, which makes its shared fixtures once, and the long ones come first (conftest.py).
# More threads would only wait on each other.
suite: install
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Also the tests marked slow, and 1,000 examples of each fuzz test in place of 60.
test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --all

# Sphinx is not needed by `make test`; a test builds the docs too where it is there.
docs: $(VENV)/.documented
	$(BIN)/python docs/figures/tables.py
	$(BIN)/python tests/configuration_keys.py
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/docs
	@echo 'open build/docs/index.html'

$(VENV)/.documented: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	touch $@

bench: install
	$(BIN)/python -m benchmarks all

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
