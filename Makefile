# `make run` and `make test` set up everything on a machine with make and Python 3.11 to 3.13.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
RECIPE ?= quickstart
QUICK := -m "not (slow or distributed)" -n auto --maxprocesses 8 --dist loadfile

.PHONY: run test test-all lint bare-llm up down chat doctor clean

run: $(VENV)/installed  ## install, then run the quickstart recipe (offline)
	$(BIN)/fromscratch run $(RECIPE) $(ARGS)

test: $(VENV)/installed-test  ## run the quick tests: those of a change, in minutes
	$(BIN)/pytest $(QUICK) $(ARGS)

test-all: test  ## run the quick tests, then those that take minutes each, one after another
	$(BIN)/pytest -m "slow or distributed" $(ARGS)

lint: $(VENV)/installed-test  ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bare-llm:  ## test llm/ with its own dependencies only, as on a bare GPU node
	sh tests/bare_llm.sh $(PYTHON)

up down chat doctor: $(VENV)/installed
	$(BIN)/fromscratch $@ $(ARGS)

clean:  ## remove the virtual environment; artifacts are kept
	rm -rf $(VENV)

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "found Python %d.%d, expected 3.11 to 3.13; choose one: make PYTHON=python3.12 run" % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/pip pyproject.toml constraints.txt
	@echo "installing into $(VENV) (takes minutes, once)"
	$(INSTALL) -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(INSTALL) -e .[test,lint,dask,ray]
	@touch $@
