# Two commands to know: `make demo` and `make test`. Both install what is missing into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# One thread per process: OpenMP threads of several processes fight for the cores. Bytecode is kept whatever the
# environment says: without it every process that a test starts compiles everything again.
ONE := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=

.PHONY: setup demo test test-all lint bench clean

setup: .venv/dev

.venv/core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

.venv/dev: .venv/core
	$(PIP) -e '.[dev]'
	touch $@

demo: .venv/core
	OMP_WAIT_POLICY=PASSIVE $(BIN)/residuum demo

test: .venv/dev
	$(ONE) $(BIN)/pytest -q -n 2 --dist worksteal -m 'not slow'

# The slow ones without the checks of types that the others have (tests/typed.py).
test-all: test
	$(ONE) $(BIN)/pytest -q -n 2 --dist worksteal -m slow -o addopts=--strict-markers

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/dev
	$(ONE) $(BIN)/python -W ignore -m benchmarks.streams
	$(ONE) $(BIN)/python -m benchmarks.probes
	$(ONE) $(BIN)/python -m benchmarks.lipschitz
	$(ONE) $(BIN)/python -m benchmarks.training
	$(ONE) $(BIN)/python -W ignore -m benchmarks.peers
	$(ONE) $(BIN)/python -W ignore -m benchmarks.reversible
	$(ONE) $(BIN)/python -W ignore -m benchmarks.solve
	$(ONE) $(BIN)/python -m benchmarks.limits
	$(ONE) $(BIN)/python -m benchmarks.runs
	$(ONE) $(BIN)/python -m benchmarks.sweeps

clean:
	rm -rf .venv dist residuum-demo
