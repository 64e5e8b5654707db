# Each target does its own set-up: an environment in .venv, made once. See scripts/setup.sh for
# PYTHON=, TORCH_INDEX= and SYSTEM_SITE=.
ARGS ?=
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest
SETUP = PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" SYSTEM_SITE="$(SYSTEM_SITE)" sh scripts/setup.sh

# The port the demo will serve on: --port N or --port=N in ARGS, none with --no-serve.
port = $(if $(findstring --no-serve,$(ARGS)),,$(or $(shell printf '%s' '$(ARGS)' | sed -n 's/.*--port[ =]*\([0-9][0-9]*\).*/\1/p'),7860))

.PHONY: help demo test test-all lint types setup
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo:  ## the whole loop on this machine; ARGS="--preset smoke --no-serve"
	@PORT="$(port)" $(SETUP) demo
	.venv/bin/reelhf demo $(ARGS)

test:  ## every test but the slow ones; ARGS="tests/rewards -k tie"
	@$(SETUP) test
	$(PYTEST) -m "not slow" $(ARGS)

test-all:  ## every test
	@$(SETUP) test-all
	$(PYTEST) $(ARGS)

lint:  ## style and formatting
	@$(SETUP) lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types:  ## static types
	@$(SETUP) types
	.venv/bin/mypy

setup:  ## only make .venv
	@$(SETUP) setup
