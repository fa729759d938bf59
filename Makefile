# Every target makes .venv and installs what it needs, unless that is there and up to date.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
STAMP := .venv/.installed
# one process per core, one thread each (tests/conftest.py)
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-all lint bench gpu clean

demo: $(STAMP)-demo
	$(BIN)/vitarium demo

test: $(STAMP)-dev
	$(PYTEST) -m "not slow"

test-all: $(STAMP)-dev
	$(PYTEST)
	$(BIN)/python tests/timm_suite.py

lint: $(STAMP)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)-dev
	$(BIN)/vitarium bench ops
	$(BIN)/vitarium bench models
	$(BIN)/vitarium bench models nat_tiny --sizes 224 800x1216 --batch-size 1 --rounds 5
	$(BIN)/vitarium bench compile
	$(BIN)/vitarium bench startup

gpu: $(STAMP)-dev
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf .venv outputs build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv

# torch and torchvision first: builds beside them must not fetch another torch
$(STAMP): .venv/bin/python pyproject.toml constraints.txt
	@echo "installing torch and vitarium into .venv (a few minutes)"
	$(INSTALL) setuptools wheel
	$(INSTALL) torch torchvision
	$(INSTALL) -e .
	@touch $@

$(STAMP)-demo: $(STAMP)
	$(INSTALL) -e ".[demo]"
	@touch $@

# natten: an oracle of the tests and a peer of the benchmarks; its build looks at torch
$(STAMP)-dev: $(STAMP)
	$(INSTALL) -e ".[dev]"
	$(INSTALL) --no-build-isolation natten || echo "natten does not build here: its test is skipped"
	@touch $@
