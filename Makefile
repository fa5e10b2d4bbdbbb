# `make demo` and `make test` are all that a fresh machine needs: each makes .venv when it is missing.

PYTHON ?= python3
# Another torch than the pinned one, in an environment of its own: make test TORCH=2.14.1
TORCH  ?=
VENV   := .venv$(if $(TORCH),-torch-$(TORCH))
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# Passed on to every pip install, for example PIP_ARGS="--extra-index-url …" for another build of torch.
PIP_ARGS ?=
# Passed on to pytest, for example PYTEST_ARGS="-k laws -x".
PYTEST_ARGS ?=
# Which parts `make bench` runs, all by default, and further options: BENCH_ARGS="--quick --strict".
BENCH ?=
BENCH_ARGS ?=
# Groups of checks and options for `make gpu`: GPU_ARGS="--dry-run", GPU_ARGS="laws graphs".
GPU_ARGS ?=
WORKERS := 2
PYTEST  = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
INSTALL = $(PIP) install --quiet $(PIP_ARGS) -c $(PINS)

# What is pinned: constraints.txt, and with TORCH that torch in its place. setuptools is what torch bounds itself.
PINS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
ifneq ($(TORCH),$(shell printf '%s' '$(TORCH)' | grep -Ex '[0-9]+[.][0-9]+([.+][A-Za-z0-9]+)*'))
$(error TORCH=$(TORCH) is no version of torch. Write one out, as in: make test TORCH=2.14.1)
endif

# With it, each of the processes that tests start would compile every module again.
unexport PYTHONDONTWRITEBYTECODE

# Kernels that DeepSpeed builds: beside the torch that they are built for, and apart from those of other runs.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions

# One environment, filled as far as a target needs it. A stamp is as new as what it was made from.
BASE  := $(VENV)/.base
CORE  := $(VENV)/.core
DEV   := $(VENV)/.dev
DOCS  := $(VENV)/.docs
PEERS := $(VENV)/.bench

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-times lint format types doctest docs notebooks pictures bench gpu clean distclean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BASE):
	@command -v $(PYTHON) > /dev/null || { echo 'There is no $(PYTHON). Name a Python of 3.11 or newer: make PYTHON=python3.12 …' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Lumen needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 …")'
	@$(PYTHON) tests/preflight.py --install
	$(PYTHON) -m venv $(VENV)
	@touch $@

ifneq ($(TORCH),)
$(PINS): constraints.txt $(BASE)
	@grep -vE '^(torch|setuptools)==' constraints.txt > $@
	@echo 'torch==$(TORCH)' >> $@
endif

$(CORE): $(BASE) pyproject.toml $(PINS)
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

test: $(DEV)  ## Run every test but the notebooks (TORCH=2.14.1: with that torch)
	@$(BIN)/python -c '' 2> /dev/null || { echo 'make test cannot start: the Python of $(VENV) is gone: rm -rf $(VENV)' >&2; exit 1; }
	@$(BIN)/python tests/preflight.py --workers $(WORKERS) $(if $(PYTEST_ARGS),--some)
	$(PYTEST) --ignore=tests/examples/test_notebooks.py $(PYTEST_ARGS)

test-all: $(DEV)  ## Run the long forms of the tests too: every case, the notebooks, other libraries
	@$(BIN)/python tests/preflight.py --workers $(WORKERS) --some
	LUMEN_TESTS=all LUMEN_PEERS=1 HYPOTHESIS_PROFILE=$(or $(HYPOTHESIS_PROFILE),nightly) $(PYTEST) $(PYTEST_ARGS)

test-times: $(DEV)  ## Run the tests, and say where their time goes (COVERAGE=1: and what of lumen/ they reach)
	$(BIN)/python -m tests.timing -n $(WORKERS) --dist worksteal --ignore=tests/examples/test_notebooks.py $(PYTEST_ARGS)

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

# It installs nothing: without .venv, or with PYTHON=…, it takes a Python that has torch and a GPU already.
gpu:  ## Check on one GPU what only a GPU can show, in about eight minutes (GPU_ARGS=--dry-run: on the CPU)
	$(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON)) -m benchmarks.gpu $(GPU_ARGS)

clean:  ## Remove build outputs and caches
	rm -rf build dist site *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## Remove the environments too
	rm -rf .venv .venv-torch-*
