# make demo      fine-tune the small checkpoint in assets/ on this machine's CPU, in a few minutes
# make test      the tests (make test-all: the slow ones too)
# make lint      ruff and mypy
# make format    let ruff put the layout right
# make docs      the documentation's site, in site/ (make docs-serve: while you write; make
#                docs-test: run the code of every page)
# make build     the wheel and the source archive, in dist/
# make bench     speed and memory, side by side with Hugging Face PEFT
#
# Each sets up what it needs in .venv first, and only when setup.cfg, setup.py or pyproject.toml has
# changed.
# PYTHON=python3.12 chooses the interpreter, VENV=folder where the environment goes, WORKERS=4 how
# many processes run the tests, and ARGS="…" is passed on to the command.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?=
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python)
WORKERS ?= 2
ARGS ?=

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check --no-input install -qq
METADATA := setup.cfg setup.py pyproject.toml

.PHONY: help demo test test-all lint format docs docs-serve docs-test build bench clean
# The demo and the benchmark are made for a CPU; where others are to be looked for, clear it.
demo bench: export JAX_PLATFORMS ?= cpu

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.base
	$(RUN) -m examples.demo $(ARGS)

test: $(VENV)/.dev
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

test-all: $(VENV)/.dev
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/.dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# The theme prints an announcement at every start unless it is told not to.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1
docs docs-serve: export JAX_PLATFORMS ?= cpu

docs: $(VENV)/.dev
	$(RUN) -m mkdocs build --strict --quiet $(ARGS)
	@echo "The documentation is in site/index.html."

docs-test: $(VENV)/.dev
	$(RUN) -m pytest -n $(WORKERS) -m slow tests/docs $(ARGS)

docs-serve: $(VENV)/.dev
	$(RUN) -m mkdocs serve $(ARGS)

# What an earlier build has left would end up in the wheel.
build: $(VENV)/.dev
	rm -rf build dist
	$(RUN) -m build $(ARGS)

bench: $(VENV)/.dev
	$(RUN) -m benchmarks.run $(ARGS)

clean:
	rm -rf out site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The environment: made once, filled for use (.base) or for development (.dev).

$(VENV)/.made:
	@if [ -e "$(VENV)" ] && ! "$(RUN)" -c '' 2>/dev/null; then \
	  echo "The environment $(VENV) is there but its Python does not run. Remove it (rm -rf $(VENV)) and try again." >&2; \
	  exit 1; \
	fi; \
	if ! "$(RUN)" -m pip --version >/dev/null 2>&1; then \
	  chosen=; \
	  for candidate in $(CANDIDATES); do \
	    if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	      chosen=$$candidate; break; \
	    fi; \
	  done; \
	  if [ -z "$$chosen" ]; then \
	    echo "No suitable Python: 3.11 or newer with venv is needed (tried: $(CANDIDATES))." >&2; \
	    echo "Install one (Debian, Ubuntu: apt install python3 python3-venv), or name one: make PYTHON=/path/to/python3.11 …" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$("$$chosen" --version)"; \
	  "$$chosen" -m venv "$(VENV)"; \
	fi
	@touch $@

$(VENV)/.base: $(METADATA) | $(VENV)/.made
	@echo "Installing peft_jax into $(VENV)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(METADATA) | $(VENV)/.made
	@echo "Installing peft_jax and its development tools into $(VENV)"
	@$(PIP) -e ".[dev]"
	@touch $@
