# The commands of README.md and CONTRIBUTING.md; `make help` lists them. Everything is installed into $(VENV).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DATA ?=
OUTPUT ?=
# The Python version of the machine that `make gpu-bundle` is for: Triton's cache depends on it.
GPU_PYTHON ?= python3.12
STAGE ?= 1
SEED ?= 0
VERSIONS ?= 4.47.1 4.51.3 4.57.6 5.17.0 5.24.0
MINUTES ?= 3
# A model and a training that one CPU core finishes in half an hour on 82,000 short histories (Amazon Instruments).
QUALITY ?= --min-items 3 --max-items 10 --batch-size 32 --epochs 2 --learning-rate 0.002 --dropout 0 --layers 2 \
	--prune-after-block 1 --d-model 64 --num-heads 4 --d-kv 16 --d-ff 256 --threads 1

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)
# Every test process uses as many threads as there are cores; waiting threads must not take the cores of the others.
# Where the tests marked `core` are; to collect the others takes longer than to run these.
CORE := tests/attention tests/pruning tests/cross_entropy tests/modules tests/integrations/transformers/test_t5_plain.py \
	tests/test_structure.py tests/test_types.py
SANITIZED := tests/attention tests/pruning tests/cross_entropy tests/modules tests/packed -k "not compile"
# The sanitizer's runtime must be the first library loaded. What no machine has memory for fails, as it would without.
SANITIZER = LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=3000 \
	PYTHONSAFEPATH=1 PYTHONPATH=build/sanitize:tests OMP_NUM_THREADS=2
INSTRUCTION_SETS = $$(PYTHONPATH=tests $(BIN)/python -c "from devices import CAPABILITIES; print(*CAPABILITIES)")
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

.PHONY: help install check test lint format fuzz sanitize sanitize-quick sanitized-library errors profile profile-long \
	quality benchmark transformers aot wheel gpu-bundle gpu-check clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | column -t -s '|'

install: $(INSTALLED) ## .venv with everything, the compiled library built in place

# torch first, so that pip chooses no other build of it. recbole without its dependencies, for its MovieLens-100K file.
$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH) "setuptools>=77" wheel ninja
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps recbole
	touch $@

check: lint ## lint, types and the core of the tests, in under 90 seconds
	$(PYTEST) -m core $(CORE)

test: install ## all tests
	$(PYTEST)

# Each release has an environment of its own, which finds everything else, torch too, in $(VENV) after its own packages.
transformers: install ## tests of the integration with several releases of transformers: VERSIONS="4.47.1 5.24.0"
	@packages=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"); failed=0; \
	for version in $(VERSIONS); do \
		own=build/transformers/$$version; log=$$own/tests.log; \
		$(BIN)/python -m venv --clear --without-pip $$own || exit 1; \
		echo "$$packages" > $$(echo $$own/lib/python*/site-packages)/shared.pth; \
		$(BIN)/pip --python $$own/bin/python install --quiet "transformers==$$version" > $$log 2>&1 && \
			PYTHONPATH=. OMP_WAIT_POLICY=passive $$own/bin/python -m pytest -q -p no:cacheprovider \
			--override-ini=addopts=--strict-markers -rfEs tests/integrations/transformers >> $$log 2>&1 || failed=1; \
		found=$$($$own/bin/python -c "import transformers; print(transformers.__version__)" 2> /dev/null); \
		test "$$found" = $$version || failed=1; \
		echo "transformers $$found: $$(tail -n 1 $$log)   ($$log)"; \
	done; exit $$failed

lint: install ## ruff, clang-format and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h')
	$(BIN)/mypy

format: install ## rewrite the sources in the committed style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h')

# Cases depend on the seed alone.
fuzz: install ## random calls of everything against float64 oracles: MINUTES=3 SEED=0
	PYTHONPATH=tests $(BIN)/python -m fuzz --seed $(SEED) --minutes $(MINUTES)

# On each instruction set in a process of its own. The thread sanitizer checks the loops over tasks.
sanitize: sanitized-library ## fuzz and tests of the CPU kernels under the sanitizers of addresses, UB and threads
	for set in $(INSTRUCTION_SETS); do \
		$(SANITIZER) STAMP_KERNELS_CPU_CAPABILITY=$$set $(BIN)/pytest -q -p no:cacheprovider -n logical $(SANITIZED) && \
		$(SANITIZER) STAMP_KERNELS_CPU_CAPABILITY=$$set $(BIN)/python -m fuzz --seed $(SEED) --backends ops \
			--cases 3000 || exit 1; \
	done
	$(BIN)/pytest -q -p no:cacheprovider tests/thread_sanitizer

sanitize-quick: sanitized-library ## a few hundred fuzz cases on each instruction set under the first two sanitizers
	for set in $(INSTRUCTION_SETS); do \
		$(SANITIZER) STAMP_KERNELS_CPU_CAPABILITY=$$set $(BIN)/python -m fuzz --seed $(SEED) --backends ops \
			--cases 400 || exit 1; \
	done

# The instrumented library and a copy of the package are in build/sanitize.
sanitized-library: install
	STAMP_KERNELS_SANITIZE=1 $(BIN)/python setup.py -q build --build-lib build/sanitize

errors: install ## docs/numerical_errors.md: rounding errors of every op beside those of PyTorch
	$(BIN)/python benchmarks/numerical_errors.py

profile: install ## the main job: what each configuration costs, on MovieLens-100K or on DATA=<file>
	$(BIN)/stamp-profile train $(if $(DATA),--data $(DATA)) --output $(or $(OUTPUT),build/profile)

# 16 sequences a step: a padded model takes 0.4 GB for each, and the process 12 GB on a CPU.
profile-long: install ## the same on histories of 100 to 250 items
	$(BIN)/stamp-profile train $(if $(DATA),--data $(DATA)) --min-items 100 --max-items 250 --batch-size 16 \
		--output $(or $(OUTPUT),build/profile-long)

# A run that was interrupted continues where it stopped.
quality: install ## Recall and NDCG after the same training, over three seeds
	$(BIN)/stamp-profile quality $(if $(DATA),--data $(DATA)) $(QUALITY) --output $(or $(OUTPUT),build/quality)

benchmark: install ## every op family against what a user would otherwise run; ends with a table
	mkdir -p build
	$(BIN)/python -m pytest -q benchmarks/micro --benchmark-only --benchmark-quiet --benchmark-json=build/micro.json
	$(BIN)/python benchmarks/table.py build/micro.json

aot: install ## compile every kernel for five GPU architectures, compare with the committed table, predict times (WRITE=1)
	$(BIN)/python benchmarks/gpu/machine_code.py $(if $(WRITE),--write)

wheel: install ## dist/stamp_kernels-*.whl
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

gpu-bundle: wheel ## build/gpu-bundle.tar.gz: what gpu-check needs on a machine without a network
	$(BIN)/python benchmarks/gpu/bundle.py build --python $(GPU_PYTHON) --wheel $(wildcard dist/stamp_kernels-*.whl) \
		$(if $(DATA),--data $(DATA))

gpu-check: ## on the machine with a GPU, whose $(PYTHON) has torch, triton and transformers: STAGE=1 or STAGE=2
	$(PYTHON) benchmarks/gpu/bundle.py run -- $(PYTHON) benchmarks/gpu/check.py --stage $(STAGE) \
		--output $(or $(OUT),build/gpu-check) $(if $(ONLY),--only $(ONLY))

clean: ## remove what the builds made
	rm -rf build dist stamp_kernels/*.so *.egg-info compile_commands.json
