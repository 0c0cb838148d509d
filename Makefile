# Run `make` to see the targets. Most of them create the virtual environment .venv if it does not exist.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# worksteal: an idle process takes tests from the others; otherwise the tests of a file stay in one process.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal
SOURCES := qft_hf qft_hf_cli tests scripts

# Without an NVIDIA GPU, a pinned PyTorch: its CPU build, if the package index has one.
ifeq ($(shell command -v nvidia-smi),)
CONSTRAINTS := -c .ci/constraints-cpu.txt
endif

unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install format lint types test test-interpreted test-compiled no-stale-kernels test-ptx faults mutants demo bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml .ci/constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qft_hf needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@# Python compiles a module when it is first imported, and only a small part of the packages is ever imported.
	$(BIN)/python -m pip install --quiet --no-compile $(CONSTRAINTS) -e '.[dev,demo,bench]'
	@touch $@

install: $(INSTALLED)  ## Create .venv with the package, its tools and what the demo needs

format: $(INSTALLED)  ## Rewrite files: formatting, import order, safe lint fixes
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

lint: $(INSTALLED)  ## Report what `make format` would change; change nothing
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(INSTALLED)  ## Check types
	$(BIN)/mypy

test: test-interpreted test-compiled  ## Run all tests that need no GPU

test-interpreted: $(INSTALLED) no-stale-kernels
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) tests/kernels/test_triton.py tests/kernels/test_adamw_triton.py \
		tests/kernels/test_large_triton.py tests/hf/test_liger_kernels.py

test-compiled: $(INSTALLED) no-stale-kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not gpu"

no-stale-kernels:  # numba's cache does not notice changes in other files
	@find qft_hf -name '*.nb[ci]' -delete

test-ptx: $(INSTALLED)  ## Test Triton's kernels as compiled for a GPU, executed on the CPU; takes minutes
	for capability in 86 90 120; do \
		OMP_NUM_THREADS=1 QFT_PTX=$$capability $(BIN)/python -m pytest $(PARALLEL) \
			tests/ptx tests/kernels/test_triton.py tests/kernels/test_adamw_triton.py || exit; \
	done

faults: $(INSTALLED)  ## Kill, damage and interrupt runs, fill their disk, and print the outcomes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults $(FAULTS)

mutants: $(INSTALLED)  ## Plant faults in the code one at a time, and check that a test fails for each
	$(BIN)/python -m tests.mutants

demo: $(INSTALLED)  ## Tune all parameters of a real 135 M model in INT8 on real dialogues
	$(BIN)/python scripts/demo.py

bench: $(INSTALLED)  ## Compare time and memory of the optimizer step with other optimizers
	$(BIN)/python scripts/benchmarks/benchmark_step.py

clean:  ## Remove the environment, fetched data and runs
	rm -rf $(VENV) data runs
