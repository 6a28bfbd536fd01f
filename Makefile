# Two commands: `make pace` makes the environment and runs the whole loop on a small table; `make test` tests everything.
#   make pace ARGS="--config.seed=1"    settings and run folder, as for launch/train.py
#   make test ARGS="tests/world -x"     arguments for pytest
#   make libero                         the real LIBERO simulator, without torch, and a check of the machine
#   make parity                         torch and diffusers: from then on `make test` also compares with the originals
#   make docs                           the documentation site, into build/docs/index.html
# VENV=folder puts the environment elsewhere.

SHELL := bash
VENV ?= .venv
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip install --quiet --disable-pip-version-check
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help pace test libero parity docs lint format clean

help:
	@sed -n '1,7s/^# //p' Makefile

pace: $(VENV)/.ready
	$(PYTHON) launch/train.py --config=configs/pace.py $(ARGS)

test: $(VENV)/.ready-dev
	$(PYTHON) -m pytest $(ARGS)

libero: $(VENV)/.ready-libero
	$(PYTHON) launch/doctor.py

parity: $(VENV)/.ready-parity

# Strict: a link that leads nowhere, a name that is not there or a page in no list of pages fails the build.
docs: $(VENV)/.ready-docs
	$(PYTHON) -m sphinx --quiet --fail-on-warning --keep-going --nitpicky -c docs -d build/doctrees . build/docs

lint: $(VENV)/.ready-dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

format: $(VENV)/.ready-dev
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# Environments and caches; runs/ stays.
clean:
	rm -rf .venv .jax_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The stamps: written when an installation is complete, so an interrupted one is taken up again and a finished one
# costs nothing.
$(VENV)/.ready: requirements.txt pyproject.toml | $(PYTHON)
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --editable .
	@touch $@

$(VENV)/.ready-dev: requirements-dev.txt $(VENV)/.ready
	$(PIP) -r requirements-dev.txt
	@touch $@

$(VENV)/.ready-libero: requirements-libero.txt $(VENV)/.ready
	$(PIP) --no-deps -r requirements-libero.txt
	@touch $@

$(VENV)/.ready-parity: requirements-parity.txt $(VENV)/.ready-dev
	$(PIP) -r requirements-parity.txt
	@touch $@

$(VENV)/.ready-docs: requirements-docs.txt $(VENV)/.ready
	$(PIP) -r requirements-docs.txt
	@touch $@

# The first Python that really runs: a version manager may put a name on the path that only prints an error.
$(PYTHON):
	@for name in python3.12 python3.11 python3.13 python3; do \
	  if "$$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	    echo "making $(VENV) with $$name"; exec "$$name" -m venv $(VENV); \
	  fi; \
	done; \
	echo "Found no Python 3.11, 3.12 or 3.13 with the venv module. Install one (Debian: apt install python3-venv)." >&2; exit 1
