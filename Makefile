# `make demo` and `make test` work on a fresh machine with Python 3.11, gcc and a package registry: they make .venv first.
PYTHON ?= python3
GPU_PYTHON ?= python3
BIN := .venv/bin
ALGO ?= hydra-ppo
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-all gpu lint format build wheel kernels clean bench

demo: build
	$(BIN)/rlhf-train demo --algorithm $(ALGO)

test: lint
	GOMP_SPINCOUNT=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" --durations=15

test-all: lint
	GOMP_SPINCOUNT=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=30

# on a CUDA machine that has everything installed: no .venv, no registry
gpu:
	@$(GPU_PYTHON) -m benchmarks.gpu

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

# registers, shared memory, spills and matrix instructions of every GPU kernel; no GPU needed
kernels: build
	$(BIN)/python -m benchmarks.kernels

# on a quiet machine: about twenty minutes
bench: .venv/.bench .venv/.trl
	$(BIN)/python -m benchmarks head --memory --json benchmarks/results/cpu/head.json
	$(BIN)/python -m benchmarks lora --memory --json benchmarks/results/cpu/lora.json
	$(BIN)/python -m benchmarks generation --json benchmarks/results/cpu/generation.json
	$(BIN)/python -m benchmarks rl --json benchmarks/results/cpu/rl.json
	$(BIN)/python -m benchmarks trl --json benchmarks/results/cpu/trl.json
	$(BIN)/python -m benchmarks table benchmarks/results/*/*.json --write

wheel: .venv/.tools
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .

build: .venv/.built

# torch comes first and from the constraints, so that nothing after it asks for another build of torch
.venv/.tools: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch setuptools wheel ninja pybind11
	touch $@

.venv/.built: .venv/.tools pyproject.toml setup.py $(CSRC)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[trainer,dev]'
	touch $@

# the peers of the extra `bench`; without them the tables say "not installed"
.venv/.bench: .venv/.built
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt trl liger-kernel cut-cross-entropy
	touch $@

# the last TRL with PPO, in an environment of its own: `python -m benchmarks rl` looks for it here
.venv/.trl: .venv/.tools benchmarks/trl029.txt
	rm -rf $@
	$(PYTHON) -m venv $@
	$@/bin/pip install -q --disable-pip-version-check -c benchmarks/trl029.txt torch
	$@/bin/pip install -q --disable-pip-version-check -c benchmarks/trl029.txt trl transformers peft accelerate datasets
	touch $@

clean:
	rm -rf build dist *.egg-info rlhf_kernels/*.so
