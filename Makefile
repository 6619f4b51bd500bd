# SPDX-License-Identifier: Apache-2.0
# The two commands of the README. Both make `.venv`, install into it, and start in seconds the second time.

PYTHON ?= python3
VENV ?= .venv
# Where pip looks for torch besides its configured index. For a CPU build from PyTorch's own index:
#   make conformance TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt
INPUTS := pyproject.toml constraints.txt

.PHONY: conformance test lint types docs clean

conformance: $(VENV)/.installed
	$(BIN)/hal conformance run --scale tiny

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(BIN)/sphinx-build -q -n -W --keep-going -b html docs docs/_build/html

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "moe-hal needs Python 3.10 or later, and this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(INPUTS) | $(VENV)/bin/python
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(VENV)/bin/python
	$(PIP) -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist docs/_build
