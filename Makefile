PYTHON ?= python3
VENV ?= .venv
DISK ?= .
DEVICE ?= cuda
GPU_WORKERS ?= 8
# Ranks share the machine's cores: more threads than cores each only slow the others down.
export OMP_NUM_THREADS ?= 1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
READY := $(VENV)/.ready
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu test-emulated-gpu lint bench bench-compile bench-memory bench-overhead bench-gpu bench-memory-gpu clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

demo: $(READY) ## train a small GPT with zero3+pp2 on four local processes
	@$(BIN)/graphshard run -n 4 examples/train_gpt.py --plan zero3+pp2

test: $(READY) ## run the test suite
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal $(ARGS)

test-gpu: $(READY) ## run what trains or computes on a CUDA device (DEVICE=cuda:1 for another one)
	@$(BIN)/python -m pytest -q -n $(GPU_WORKERS) --dist worksteal --device $(DEVICE) $(ARGS)

test-emulated-gpu: $(READY) ## the same on a GPU that the CPU emulates, slowly; it needs a C++ compiler
	@PYTHONPATH=tests $(BIN)/python -m pytest -q -n 2 --dist worksteal -p emulated.gpu --device cuda --timeout 1200 $(ARGS)

lint: $(READY) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(READY) ## compare speed with FSDP2, DDP and torch.distributed.pipelining
	@$(BIN)/python examples/bench/run.py $(ARGS)

bench-memory: $(READY) ## what recomputation and a file for optimizer state cost and save (DISK=folder)
	@$(BIN)/python examples/bench/recompute.py
	@$(BIN)/python examples/bench/offload.py --path $(DISK)

bench-compile: $(READY) ## what starting costs, cold and from the cache, beside torch.compile
	@$(BIN)/python examples/bench/compile.py $(ARGS)

bench-overhead: $(READY) ## what the executor's Python costs for each instruction
	@$(BIN)/python examples/bench/overhead.py $(ARGS)

bench-gpu: $(READY) ## kernels, the update and a Llama's step on a CUDA device, beside torch's and Inductor's
	@$(BIN)/python examples/bench/speed.py --device $(DEVICE) $(ARGS)

bench-memory-gpu: $(READY) ## memory on a CUDA device, and whether copies are hidden behind computing (DISK=folder)
	@$(BIN)/python examples/bench/gpu.py --device $(DEVICE) --path $(DISK) $(ARGS)

clean: ## remove the virtual environment and what runs wrote
	@rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "graphshard needs Python 3.11 or later; set PYTHON=")'
	@echo "setting up $(VENV) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install "$(TORCH)"
	@$(PIP) install --constraint constraints.txt --editable ".[dev]"
	@touch $@
