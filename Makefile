# Run `make` to see the targets. Each creates the virtual environment .venv if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Who is done takes tests from the others; those of a file stay together else.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal
SOURCES := qft_hf qft_hf_cli tests scripts

# A machine without an NVIDIA GPU takes the CPU build of PyTorch.
ifeq ($(shell command -v nvidia-smi),)
CONSTRAINTS := -c .ci/constraints-cpu.txt
endif

unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install format lint types test test-ptx faults mutants demo bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml .ci/constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qft_hf needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@# What is imported is compiled then, and kept: a small part of what is installed.
	$(BIN)/python -m pip install --quiet --no-compile $(CONSTRAINTS) -e '.[dev,demo,bench]'
	@touch $@

install: $(INSTALLED)  ## Create .venv with the package, its tools and the demo's needs

format: $(INSTALLED)  ## Rewrite files: formatting, import order, safe lint fixes
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

lint: $(INSTALLED)  ## Check what `make format` would change; change nothing
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(INSTALLED)  ## Check types
	$(BIN)/mypy

test: $(INSTALLED)  ## All tests that need no GPU
	@find qft_hf -name '*.nb[ci]' -delete  # compiled code does not notice changes in other files
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) tests/kernels/test_triton.py tests/kernels/test_adamw_triton.py tests/hf/test_liger_kernels.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not gpu"

test-ptx: $(INSTALLED)  ## Triton's kernels as compiled for a GPU, executed on this machine: minutes
	for capability in 86 90; do \
		OMP_NUM_THREADS=1 QFT_PTX=$$capability $(BIN)/python -m pytest $(PARALLEL) \
			tests/ptx tests/kernels/test_triton.py tests/kernels/test_adamw_triton.py || exit; \
	done

faults: $(INSTALLED)  ## Kill, damage, interrupt and starve runs, and print what came of it
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults $(FAULTS)

mutants: $(INSTALLED)  ## Plant faults one at a time: does a test see each?
	$(BIN)/python -m tests.mutants

demo: $(INSTALLED)  ## Tune a real 135 M model on real dialogues in INT8, all parameters
	$(BIN)/python scripts/demo.py

bench: $(INSTALLED)  ## Time and memory of the optimizer step beside its peers
	$(BIN)/python scripts/benchmarks/benchmark_step.py

clean:  ## Remove the environment, fetched data and runs
	rm -rf $(VENV) data runs
