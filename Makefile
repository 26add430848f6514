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

.PHONY: help demo test lint types wheel asan clean

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
	$(BIN)/clang-format --dry-run --Werror csrc/*/*.cpp csrc/*/*.h

types: $(STAMP) ## check the types of the package
	$(BIN)/mypy

# The wheel is made from the sdist, so that the sdist is complete, and tested where only torch is.
wheel: $(STAMP) ## build sdist and wheel in dist/ and test the wheel without the source tree
	rm -rf dist build/clean && mkdir -p dist build
	$(BIN)/python -c 'from setuptools import build_meta as b; b.build_sdist("dist")' > build/sdist.log
	$(PIP_INSTALL:install=wheel) --no-build-isolation --no-deps --no-index -q -w dist dist/*.tar.gz
	$(BIN)/python -m venv --without-pip build/clean
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  $$(build/clean/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth
	$(BIN)/python -m pip --python build/clean/bin/python install -q --no-deps --no-index dist/*.whl
	cd build/clean && bin/python -P -m loft_kernels selftest --require cpu && bin/python -P -c \
	  'from loft_kernels.backends.triton import configs; configs.frozen()' && ls ../../dist

# Leaks are not looked for: Python itself leaves memory to the end of the process.
asan: SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
asan: $(STAMP) ## run the tests of the C++ backend under AddressSanitizer and UBSan (10 minutes)
	rm -rf build/asan
	CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" \
	  $(PIP_INSTALL) --no-build-isolation --no-deps -q --target build/asan .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) \
	  $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 bash -c ' \
	  cd build/asan && nm -D loft_kernels/_native* | grep -q __asan && \
	  ../../$(BIN)/python -m pytest -n 0 ../../tests/test_cpu{,_ops,_fuzz}.py $(ARGS)'

clean: ## remove the environment, build outputs and caches (results/ stays)
	rm -rf $(VENV) build dist *.egg-info loft_kernels/_native* .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip's lines on what is already there, and on where it looks, are left out; errors are not.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
PROGRESS := awk '/^(Collecting|Installing|Successfully|ERROR)/ {print; fflush()}'

# What requirements.txt names in a comment.
INSTALL_ALSO = { set -o pipefail; $(PIP_INSTALL) $$(sed -n 's/^\# \($(1)==.*\)/\1/p' requirements.txt) | $(PROGRESS); }

$(STAMP): $(VENV)/.requirements pyproject.toml setup.py $(wildcard csrc/*/*)
	set -o pipefail; $(PIP_INSTALL) --no-build-isolation --no-deps -e . | $(PROGRESS)
	@touch $@

$(VENV)/.requirements: requirements.txt
	@command -v $(PYTHON) > /dev/null || { echo 'No $(PYTHON) here: make PYTHON=/path/to/python'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1):" \
	    'try make PYTHON=python3.12'; exit 1; }
	@echo 'Installing requirements.txt into $(VENV); the first time takes some minutes.'
	$(PYTHON) -m venv $(VENV)
	set -o pipefail; $(PIP_INSTALL) -r requirements.txt | $(PROGRESS)
	$(BIN)/python -c 'import triton' 2> /dev/null || $(call INSTALL_ALSO,triton)
	$(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None and sys.platform == "linux")' || \
	  $(call INSTALL_ALSO,deepspeed)
	@touch $@
