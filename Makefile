# Every command sets up what it needs: a virtual environment in .venv, installed as constraints.txt
# says. `make` alone lists the commands.

SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin

# The interpreter that .venv is made with: the first suitable one on the path.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	2>/dev/null && echo "$$python" && break; done)

# Where to look for torch besides the configured index. Empty: nowhere else, which on Linux means a
# build with CUDA. https://download.pytorch.org/whl/cpu has the much smaller CPU build.
TORCH_INDEX_URL ?=
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	$(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) -c constraints.txt

PACKAGES := aptserve aptserve_scheduler aptserve_worker aptserve_kernels

# Passed on to `aptserve up`, pytest, the benchmark and the study.
ARGS ?=
PROMPT ?= def read_config(path):

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  ARGS="..."         more arguments for run, test, bench, study and gpu-check'
	@echo '  PYTHON=python3.12  the interpreter to set up with (3.11, 3.12 or 3.13)'
	@echo '  TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu'
	@echo '                     set up with the CPU build of torch, on a machine without a GPU'

$(VENV)/.installed: pyproject.toml constraints.txt
	@if [ -z '$(PYTHON)' ]; then \
		echo 'Needs Python 3.11, 3.12 or 3.13; name one: make PYTHON=/path/to/python3.12' >&2; \
		exit 1; fi
	@echo 'Setting up $(VENV) (some minutes the first time)'
	@[ -x $(BIN)/python ] || '$(PYTHON)' -m venv $(VENV)
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	@$(PIP_INSTALL) -e '.[bench]'
	@touch $@

.PHONY: install
install: $(VENV)/.installed ## Create .venv and install everything into it

.PHONY: run
run: export FIRST_PROMPT = $(PROMPT)
run: install ## Serve the embedded model until Ctrl-C, after one answer to PROMPT
	@exec $(BIN)/aptserve up --first-prompt "$$FIRST_PROMPT" $(ARGS)

.PHONY: test
test: install ## Run all tests
	@$(BIN)/python -m pytest $(ARGS)

.PHONY: lint
lint: install ## Check style, types, import rules and the protocol
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES:%=-p %)
	$(BIN)/mypy tools
	$(BIN)/buf lint protos
	$(BIN)/python tools/check_imports.py

.PHONY: format
format: install ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: protos
protos: install ## Write the Python code of protos/
	PATH="$(abspath $(BIN)):$$PATH" tools/generate_protos.sh

.PHONY: check-protos
check-protos: install ## Fail when the committed code of protos/ is not what protos/ gives
	@PATH="$(abspath $(BIN)):$$PATH" tools/check_protos.sh

.PHONY: bench
bench: $(VENV)/.installed-bench ## Measure, and compare with other engines
	@$(BIN)/python -m benchmarks $(ARGS)

.PHONY: study
study: $(VENV)/.installed-bench ## Compare all schedulers on simulated GPUs; an hour on two cores
	@$(BIN)/python -m benchmarks.study $(ARGS)

.PHONY: gpu-check
gpu-check: export PYTHONPATH := client:scheduler_svc:gpu_worker:kernels$(addprefix :,$(PYTHONPATH))
gpu-check: ## Check and measure the kernels and the worker on a GPU; installs nothing
	@$(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m benchmarks.gpu_check $(ARGS)

.PHONY: docker-check
docker-check: install ## Run the install steps and entry points of both images without Docker
	@$(BIN)/python tools/check_images.py --build-arg TORCH_INDEX_URL=$(TORCH_INDEX_URL) $(ARGS)

.PHONY: clean
clean: ## Remove .venv and everything generated
	rm -rf $(VENV) build dist client/*.egg-info *.egg-info \
		.mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
