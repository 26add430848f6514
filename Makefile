# make demo, make test: everything runs in .venv, which is made from requirements.txt when needed.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
ARGS ?=

# A thread that waits for the others sleeps. Spinning, the default, is a little faster on an idle
# machine, and ten times slower where another program keeps one of the cores busy.
export OMP_WAIT_POLICY ?= PASSIVE

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test lint types clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s%s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo 'make PYTHON=python3.12 ...          another Python for .venv (3.10 or newer)'
	@echo 'make demo ARGS="--steps 200"        options of examples/finetune.py (see ARGS=--help)'
	@echo 'make test ARGS="-k name"            options of pytest'

demo: $(STAMP) ## fine-tune a small model by three methods and compare (4 minutes on 2 cores)
	$(BIN)/python examples/finetune.py $(ARGS)

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(STAMP) ## check formatting and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP) ## check the types of the package
	$(BIN)/mypy

clean: ## remove the environment, build outputs and caches (results/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip's lines on what is already there, and on where it looks, are left out; errors are not.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
PROGRESS := awk '/^(Collecting|Installing|Successfully|ERROR)/ {print; fflush()}'

$(STAMP): requirements.txt pyproject.toml setup.py
	@command -v $(PYTHON) > /dev/null || { echo 'No $(PYTHON) here: make PYTHON=/path/to/python'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1):" \
	    'try make PYTHON=python3.12'; exit 1; }
	@echo 'Installing requirements.txt into $(VENV); the first time takes some minutes.'
	$(PYTHON) -m venv $(VENV)
	set -o pipefail; $(PIP_INSTALL) -r requirements.txt | $(PROGRESS)
	$(BIN)/python -c 'import triton' 2> /dev/null || \
	  { set -o pipefail; $(PIP_INSTALL) $$(sed -n 's/^# \(triton==.*\)/\1/p' requirements.txt) | $(PROGRESS); }
	set -o pipefail; $(PIP_INSTALL) --no-build-isolation --no-deps -e . | $(PROGRESS)
	@touch $@
