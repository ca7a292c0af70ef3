# Every target first sets up an environment in .venv, and again when pyproject.toml or constraints.txt change.

VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: setup demo test lint

setup: $(INSTALLED)

# PyTorch is installed first and alone, so that pip takes a CPU build wherever it finds one. The stamp is written last,
# so an interrupted set-up starts again.
$(INSTALLED): pyproject.toml constraints.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet -c constraints.txt torch
	$(PYTHON) -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	HF_HUB_OFFLINE=1 $(PYTHON) scripts/demo.py

# The tests that `transformers` runs on its own models are downloaded once and kept in .cache. One thread per process:
# two processes with two threads each would compete for two cores.
test: setup
	$(PYTHON) tests/fetch_transformers_tests.py
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 tests

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
