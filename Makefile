# Each target sets up all that it needs. The set-up is done once, and again when pyproject.toml or constraints.txt
# changes; it needs Python 3.11 or newer, as the pinned versions do.

VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: setup demo test lint

setup: $(INSTALLED)

# PyTorch comes first and alone, so that a CPU build is taken wherever pip is shown one. The stamp is written last: a
# set-up that was interrupted starts again.
$(INSTALLED): pyproject.toml constraints.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed here, for the pinned versions")'
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet -c constraints.txt torch
	$(PYTHON) -m pip install --quiet -c constraints.txt -e ".[video,train,dev]"
	touch $@

demo: setup
	HF_HUB_OFFLINE=1 $(PYTHON) scripts/demo.py

# The tests that `transformers` holds its own models to are fetched once, and run from the cache. One thread a process,
# or two processes would fight for two cores with four threads.
test: setup
	$(PYTHON) tests/fetch_transformers_tests.py
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 tests

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
