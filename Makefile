# `make run` and `make test` do everything on a fresh machine that has Python 3.11 to 3.13 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
RECIPE ?= quickstart

.PHONY: run test lint bare-llm up down chat doctor clean

run: $(VENV)/installed  ## the quickstart recipe: a language model from real text, offline
	$(BIN)/fromscratch run $(RECIPE) $(ARGS)

test: $(VENV)/installed-test  ## the tests
	$(BIN)/pytest $(ARGS)

lint: $(VENV)/installed-test  ## style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bare-llm:  ## llm/ and its tests, with llm's own dependencies alone, as on a bare GPU node
	sh tests/bare_llm.sh $(PYTHON)

up down chat doctor: $(VENV)/installed
	$(BIN)/fromscratch $@ $(ARGS)

clean:  ## remove the environment; artifacts stay
	rm -rf $(VENV)

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "Python 3.11 to 3.13 is needed, this is %d.%d; name another: make PYTHON=python3.12 run" % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/pip pyproject.toml constraints.txt
	@echo "installing into $(VENV) (minutes, once)"
	$(INSTALL) -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(INSTALL) -e .[test,lint,dask,ray]
	@touch $@
