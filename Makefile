# Everything starts from a bare checkout: python3, g++ and make. Variables to set:
#   PYTHON      the interpreter .venv is made from
#   TORCH       which torch .venv and the wheel check get
#   BENCH_ARGS  options of the benchmark
#   MAX_JOBS    how many compilers run at a time; default: the number of CPUs
#   OUT         where gpu-check leaves its logs
#   STEPS       which steps gpu-check takes, for instance "build bench"; default: all
#   GRADFUSED_CUDA, GRADFUSED_CUDA_ARCHS   whether and for which GPUs to build CUDA: tools/build/nvcc.py
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BENCH_ARGS ?=
OUT ?= build/gpu-check
STEPS ?=

PY := $(VENV)/bin/python
READY := $(VENV)/.gradfused-ready

.PHONY: bench test test-all lint wheel wheel-check sanitize gpu-check sass native clean

bench: native
	@$(PY) -m gradfused.bench $(BENCH_ARGS)

# One process for each CPU. Threads sleep while they wait: otherwise those of one process would spin while another works.
PYTEST := OMP_WAIT_POLICY=passive $(PY) -m pytest -n auto --dist worksteal

test: native
	@$(PYTEST) --cov --cov-fail-under=95

# Adds the whole conformance suite on the Triton backend, interpreted, which takes some 20 minutes on two cores, and compiles
# every kernel for every target, which takes 10 minutes for each.
test-all: native
	@$(PYTEST) --interpret-all
	@$(PY) tools/check/check_triton.py --all
	@$(PY) tools/check/check_triton_lpg.py --all

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.def' | xargs $(VENV)/bin/clang-format --dry-run --Werror
	$(PY) -m mypy

# wheel builds for every CPython of 3.10 to 3.13 on PATH or in pyenv, wheel-check only for the one in .venv.
wheel: $(READY)
	@$(PY) tools/build/wheels.py --torch "$(TORCH)" --all

wheel-check: $(READY)
	@$(PY) tools/build/wheels.py --torch "$(TORCH)"

sanitize: $(READY)
	@$(PY) tools/check/sanitize.py

# Uses the python3 that has torch with CUDA, and installs nothing, since such machines may be offline.
gpu-check:
	@$(PYTHON) tools/check/gpu_check.py --out "$(OUT)" $(STEPS)

# Reads registers, spills and access widths from the machine code of the CUDA kernels. No GPU is needed.
sass: native
	@$(PY) tools/check/check_sass.py

# The incremental rebuild of the native modules, which the editable install has compiled once.
native: $(READY)
	@$(PY) setup.py --quiet build_ext --inplace

# torch is installed first and by itself, so that TORCH decides which build of it is taken.
$(READY): pyproject.toml setup.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet --editable ".[test,bench,dev]"
	@touch $@

clean:
	rm -rf build dist *.egg-info gradfused/*.so .coverage htmlcov .benchmarks .hypothesis
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
