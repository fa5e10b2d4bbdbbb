# `make demo` and `make test` are all that a fresh machine needs: each makes .venv when it is missing.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# Passed on to every pip install, for example PIP_ARGS="--extra-index-url …" for another build of torch.
PIP_ARGS ?=
# Passed on to pytest, for example PYTEST_ARGS="-k laws -x".
PYTEST_ARGS ?=
# Which parts `make bench` runs, all by default, and further options: BENCH_ARGS="--quick --strict".
BENCH ?=
BENCH_ARGS ?=
PYTEST  = $(BIN)/python -m pytest -n 2 --dist worksteal
INSTALL = $(PIP) install --quiet $(PIP_ARGS) -c constraints.txt

# One environment, filled as far as a target needs it. A stamp is as new as what it was made from.
BASE  := $(VENV)/.base
CORE  := $(VENV)/.core
DEV   := $(VENV)/.dev
DOCS  := $(VENV)/.docs
PEERS := $(VENV)/.bench

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format types doctest docs notebooks pictures bench clean distclean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BASE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Lumen needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(CORE): $(BASE) pyproject.toml constraints.txt
	@echo "Installing Lumen and what its examples need into $(VENV) (a few minutes the first time) …"
	$(INSTALL) -e '.[examples]'
	@touch $@

$(DEV): $(CORE)
	@echo "Installing the development tools into $(VENV) …"
	$(INSTALL) -e '.[dev]'
	@touch $@

$(DOCS): $(DEV)
	$(INSTALL) -e '.[docs]'
	@touch $@

$(PEERS): $(CORE)
	$(INSTALL) -e '.[bench]'
	@touch $@

demo: $(CORE)  ## Train on handwritten digits, with progress, logs and a final table
	$(BIN)/python examples/digits.py

test: $(DEV)  ## Run every test but the notebooks
	$(PYTEST) --ignore=tests/examples/test_notebooks.py $(PYTEST_ARGS)

lint: $(DEV)  ## Check style, format, spelling and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports --no-logo

format: $(DEV)  ## Put the code in its format, with the fixes that are safe
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV)  ## Check the types of lumen/, strictly
	$(BIN)/mypy

doctest: $(DEV)  ## Run the examples in the docstrings
	$(PYTEST) --doctest-modules lumen $(PYTEST_ARGS)

docs: $(DOCS)  ## Build the documentation into site/, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: $(DEV)  ## Run every notebook from its first cell to its last
	$(PYTEST) tests/examples/test_notebooks.py $(PYTEST_ARGS)

pictures: $(DEV)  ## Make the pictures of the documentation anew
	$(BIN)/python docs/images/make.py

bench: $(PEERS)  ## Measure speed and memory beside other libraries (BENCH="leaves sweep", BASELINE=1)
	$(BIN)/python -m benchmarks $(BENCH) $(if $(BASELINE),--write-baseline) $(BENCH_ARGS)

clean:  ## Remove build outputs and caches
	rm -rf build dist site *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## Remove the environment too
	rm -rf $(VENV)
