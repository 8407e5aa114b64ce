# Two commands do everything on a fresh machine: `make run` and `make test`.
.DELETE_ON_ERROR:
.PHONY: help setup run test slow lint bench bundle install clean

VENV := .venv
# The first Python that is new enough.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do \
	$$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p && break; done)
# How the tests are spread over the cores. PYTEST_ADDOPTS wins: with -n 0 or -p no:xdist they run one by one.
SPREAD := $(if $(findstring no:xdist,$(PYTEST_ADDOPTS)),,-n auto --maxprocesses 8 --dist worksteal)
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

help:
	@echo 'make run     set up, then: python launch.py nano3 sft local  (two pods on this machine)'
	@echo 'make test    set up, then the tests (a few minutes)'
	@echo 'make slow    the slow proofs too: scale, chaos, real clusters'
	@echo 'make lint    ruff and mypy'
	@echo 'make bench   the benchmarks; CHECKOUT=... measures NVIDIA beside them'
	@echo 'make bundle  dist/airlift-<version>.tar.gz for an air gap; BUNDLE="--torch --python 3.12" says more'
	@echo 'make install in an unpacked bundle: verify it and set up $(VENV), without a network'
	@echo 'make setup   only the virtual environment in $(VENV)'
	@echo 'make clean   remove what make and the local profile wrote here'

setup: $(VENV)/launcher $(VENV)/recipes

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo 'airlift: needs Python 3.11 or later with venv; name one: make PYTHON=/path/to/python3.12' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/launcher: requirements.txt | $(VENV)/bin/python
	$(PIP) --require-hashes -r requirements.txt
	@touch $@

$(VENV)/recipes: requirements-recipes.txt requirements-torch.txt | $(VENV)/bin/python
	$(PIP) --require-hashes -r requirements-recipes.txt
	$(PIP) -r requirements-torch.txt
	@touch $@

$(VENV)/dev: requirements-dev.txt requirements-newer.txt | $(VENV)/bin/python
	$(PIP) --require-hashes -r requirements-dev.txt
	$(PIP) --require-hashes --no-deps --upgrade --target $(VENV)/newer -r requirements-newer.txt
	@touch $@

run: setup
	$(VENV)/bin/python launch.py nano3 sft local

test: setup $(VENV)/dev
	PYTEST_ADDOPTS="$(SPREAD) $$PYTEST_ADDOPTS" $(VENV)/bin/python -m pytest -m 'not slow'

slow: setup $(VENV)/dev
	$(VENV)/bin/python -m pytest -m slow

lint: setup $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# ROUNDS, NODES and PLATFORM make it short (nemo-run's own path takes five minutes on run:AI); with CHECKOUT, a set-up checkout of Nemotron, NVIDIA's launcher is measured beside ours.
ROUNDS := 5
PLATFORM :=
NODES := 100 1000 10000
bench: setup $(VENV)/dev
	$(VENV)/bin/python benchmarks/submit.py $(PLATFORM) --rounds $(ROUNDS)
	$(VENV)/bin/python benchmarks/dry_run.py $(CHECKOUT)
	$(VENV)/bin/python benchmarks/ray_join.py $(NODES)
	$(if $(CHECKOUT),$(VENV)/bin/python benchmarks/payload.py $(CHECKOUT))
	$(if $(CHECKOUT),NEMOTRON_ROOT=$(CHECKOUT) $(VENV)/bin/python benchmarks/data_prep.py --rounds $(ROUNDS))

bundle: | $(VENV)/bin/python
	$(VENV)/bin/python bundle.py make $(BUNDLE)

install:
	@test -n "$(PYTHON)" || { echo 'airlift: needs Python 3.11 or later with venv; name one: make install PYTHON=/path/to/python3.12' >&2; exit 2; }
	@$(PYTHON) bundle.py install

clean:
	rm -rf $(VENV) output .pytest_cache .mypy_cache .ruff_cache .hypothesis
