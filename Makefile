# The commands of README.md and CONTRIBUTING.md. Everything is installed into $(VENV).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DATA ?=
OUTPUT ?=
# Of the machine that `make gpu-bundle` is for: Triton's cache depends on it.
GPU_PYTHON ?= python3.12
STAGE ?= 1
# A model and a training that one CPU core finishes in half an hour on 82,000 short histories (Amazon Instruments).
QUALITY ?= --min-items 3 --max-items 10 --batch-size 32 --epochs 2 --learning-rate 0.002 --dropout 0 --layers 2 \
	--prune-after-block 1 --d-model 64 --num-heads 4 --d-kv 16 --d-ff 256 --threads 1

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: install test lint profile profile-long quality benchmark aot wheel gpu-bundle gpu-check clean

install: $(INSTALLED)

# torch first, so that no other build of it is chosen; recbole alone, for the MovieLens-100K file that it ships.
$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH) "setuptools>=77" wheel ninja
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps recbole
	touch $@

# Each process has as many threads as there are cores; those that wait must not take the others' cores.
test: install
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The main job: what each configuration costs, on MovieLens-100K or on DATA=<file>.
profile: install
	$(BIN)/stamp-profile train $(if $(DATA),--data $(DATA)) --output $(or $(OUTPUT),build/profile)

# The same on histories of 100 to 250 items. 16 a step: padded models take 0.4 GB each, and the process 12 GB on a CPU.
profile-long: install
	$(BIN)/stamp-profile train $(if $(DATA),--data $(DATA)) --min-items 100 --max-items 250 --batch-size 16 \
		--output $(or $(OUTPUT),build/profile-long)

# Recall and NDCG after the same training from three seeds. A run that was ended goes on where it was.
quality: install
	$(BIN)/stamp-profile quality $(if $(DATA),--data $(DATA)) $(QUALITY) --output $(or $(OUTPUT),build/quality)

# Every op family against what a user would run instead; the table comes last.
benchmark: install
	mkdir -p build
	$(BIN)/python -m pytest -q benchmarks/micro --benchmark-only --benchmark-quiet --benchmark-json=build/micro.json
	$(BIN)/python benchmarks/table.py build/micro.json

# Every kernel that T5, Qwen and the benchmarks launch, compiled for five GPU architectures without a GPU, and compared
# with benchmarks/gpu/machine_code.csv (WRITE=1 brings that up to date).
aot: install
	$(BIN)/python benchmarks/gpu/machine_code.py $(if $(WRITE),--write)

wheel: install
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

# What the next target needs on a machine with a GPU and no network, made here: build/gpu-bundle.tar.gz.
gpu-bundle: wheel
	$(BIN)/python benchmarks/gpu/bundle.py build --python $(GPU_PYTHON) --wheel $(wildcard dist/stamp_kernels-*.whl) \
		$(if $(DATA),--data $(DATA))

# On the machine with a GPU, whose $(PYTHON) has torch, triton and transformers: STAGE=1 or STAGE=2.
gpu-check:
	$(PYTHON) benchmarks/gpu/bundle.py run -- $(PYTHON) benchmarks/gpu/check.py --stage $(STAGE) \
		--output $(or $(OUT),build/gpu-check) $(if $(ONLY),--only $(ONLY))

clean:
	rm -rf build dist stamp_kernels/*.so *.egg-info
