# `make demo` and `make test` work on a fresh machine with Python 3.11, gcc and a package registry: they make .venv first.
PYTHON ?= python3
GPU_PYTHON ?= python3
BIN := .venv/bin
ALGO ?= hydra-ppo
CUDA_TORCH := .venv/.cuda
CUDA_TORCH_VERSION ?= 2.11.0
WHEEL := wheel -q --disable-pip-version-check --no-build-isolation --no-deps -w dist dist/*.tar.gz
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-all gpu lint format build wheel cuda-torch kernels clean bench

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

# into dist/: the source distribution, the CPU wheel made from it, and one with CUDA code (sm_80, sm_90a) where there are
# nvcc and a Python whose torch is a CUDA build: GPU_PYTHON, .venv, or what `make cuda-torch` has made
wheel: .venv/.tools
	rm -rf dist
	RLHF_KERNELS_CUDA=0 $(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')" >dist.log 2>&1 \
	  || { cat dist.log; exit 1; }
	rm dist.log
	RLHF_KERNELS_CUDA=0 $(BIN)/python -m pip $(WHEEL)
	@for python in $(GPU_PYTHON) $(BIN)/python $(CUDA_TORCH)/bin/python; do \
	  $$python -c "import sys, torch; sys.exit(torch.version.cuda is None)" 2>/dev/null || continue; \
	  command -v nvcc >/dev/null || { echo "no wheel with CUDA code: there is no nvcc"; exit 0; }; \
	  echo "with CUDA code, by $$python"; RLHF_KERNELS_CUDA=1 $$python -m pip $(WHEEL); exit; \
	done; echo "no wheel with CUDA code: no CUDA build of torch; GPU_PYTHON=... names a Python that has one"

# a CUDA build of torch for a machine without a GPU, on which it links (530 MB; nothing of NVIDIA's but the runtime)
cuda-torch: $(CUDA_TORCH)/.made

$(CUDA_TORCH)/.made: .venv/.tools tests/cuda_torch.py
	$(BIN)/python tests/cuda_torch.py $(CUDA_TORCH) $(CUDA_TORCH_VERSION)
	touch $@

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
