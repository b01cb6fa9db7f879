# The commands of README.md and CONTRIBUTING.md. Everything is installed into $(VENV).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DATA ?=
OUTPUT ?= build/profile

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.h csrc/*/*)

.PHONY: install test lint profile benchmark aot wheel gpu-check clean

install: $(INSTALLED)

# torch first, so that no other build of it is chosen; recbole alone, for the MovieLens-100K file that it ships.
$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH) "setuptools>=77" wheel ninja
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps recbole
	touch $@

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The main job: what each configuration costs, on MovieLens-100K or on DATA=<file>.
profile: install
	$(BIN)/stamp-profile train $(if $(DATA),--data $(DATA)) --output $(OUTPUT)

# Every op family against what a user would run instead; the table comes last.
benchmark: install
	mkdir -p build
	$(BIN)/python -m pytest -q benchmarks/micro --benchmark-only --benchmark-quiet --benchmark-json=build/micro.json
	$(BIN)/python benchmarks/table.py build/micro.json

# Every Triton kernel and table entry, compiled for sm_80, sm_90 and sm_100 without a GPU.
aot: install
	$(BIN)/python -m stamp_kernels.triton_kernels.compile_ahead

wheel: install
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

# On a machine with a GPU and no network: uses $(PYTHON)'s own packages, and the wheel in dist/ if there is one.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(if $(DATA),--data $(DATA)) $(if $(PARTS),--parts $(PARTS)) $(if $(OUT),--output $(OUT))

clean:
	rm -rf build dist stamp_kernels/*.so *.egg-info
