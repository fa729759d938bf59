# Every target makes .venv and installs what it needs, unless that is there and up to date.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
STAMP := .venv/.installed
# mmcv asks for opencv-python, which wants a display's libraries and fills the folder of the other.
HEADLESS = $(BIN)/python -m pip uninstall --quiet --yes opencv-python && \
	$(INSTALL) --force-reinstall --no-deps opencv-python-headless
# one process per core, one thread each (tests/conftest.py)
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

# what `make gpu` runs on; make GPU_PYTHON=python3 takes one that has all and installs nothing
GPU_PYTHON ?= $(BIN)/python
GPU_BENCH := $(GPU_PYTHON) -m vitarium_cli bench
GPU_PLOT = $(shell $(GPU_PYTHON) -c 'import matplotlib' 2>/dev/null && echo --plot benchmarks)
SANITIZER ?= compute-sanitizer

.PHONY: demo test test-all lint bench weights training gpu clean

demo: $(STAMP)-demo
	$(BIN)/vitarium demo

test: $(STAMP)-dev
	$(PYTEST) -m "not slow"

test-all: $(STAMP)-dev
	$(PYTEST)
	$(BIN)/python tests/timm_suite.py
	$(BIN)/python tests/embed_storm.py
	$(BIN)/python tests/mmdet_operators.py
	$(BIN)/python tests/mmdet_suite.py

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
	$(BIN)/vitarium bench embed

weights: $(STAMP)-dev
	$(BIN)/python -m pytest -q tests/test_download.py tests/test_lock.py tests/test_hub.py
	$(BIN)/python tests/download_storm.py
	$(BIN)/python tests/checkpoint_mutations.py --count 2000
	$(BIN)/vitarium bench convert

training: $(STAMP)-dev
	$(BIN)/python tests/train_storm.py
	$(BIN)/python tests/detect_storm.py
	$(BIN)/python tests/embed_storm.py
	$(BIN)/vitarium bench embed
	$(BIN)/vitarium train upernet_nat_atto_digits --output $$(mktemp -d)/run
	$(BIN)/vitarium train mask_rcnn_nat_atto_digits --output $$(mktemp -d)/run
	$(BIN)/vitarium bench digits --jobs 2 --csv benchmarks/digits_cpu.csv --plot benchmarks

# torch's cache of memory would hide what is read behind the end of a tensor
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(STAMP)-dev)
	$(GPU_PYTHON) -m pytest -m gpu
	@if command -v $(SANITIZER) >/dev/null; then set -ex; for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 VITARIUM_AUTOTUNE=0 $(SANITIZER) --tool $$tool \
			--error-exitcode 1 $(GPU_PYTHON) -m pytest -m gpu -k sanitizer; done; \
	else echo "$(SANITIZER) is not installed: memcheck and racecheck did not run"; fi
	$(GPU_BENCH) ops --device cuda --csv benchmarks/ops_cuda.csv $(GPU_PLOT)
	$(GPU_BENCH) models $(GPU_MODELS) --device cuda --dtype bfloat16 --batch-size 128 --compile \
		--mode both --csv benchmarks/models_cuda.csv $(GPU_PLOT)

SWIN := swin_tiny_patch4_window7_224
GPU_MODELS := fused_$(SWIN) $(SWIN) nat_tiny nat_tiny+aten biformer_small biformer_small+aten \
	agent_swin_tiny agent_swin_tiny+aten fused_davit_tiny davit_tiny convnext_tiny

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
	$(HEADLESS)
	@touch $@

# natten: an oracle of the tests and a peer of the benchmarks; its build looks at torch
$(STAMP)-dev: $(STAMP)
	$(INSTALL) -e ".[dev]"
	$(HEADLESS)
	$(INSTALL) --no-build-isolation natten || echo "natten does not build here: its test is skipped"
	@touch $@
