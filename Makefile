# `make demo` and `make test` need Python 3.11 or newer and nothing else: they make their own .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo check test test-all lint clean

demo: $(VENV)/.demo  ## Poison a small classifier, sanitize it, leave model and report in artifacts/demo
	$(BIN)/qdeploy demo

PYTEST := $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist worksteal --max-worker-restart 0 --costs

check: lint  ## Style, types, and the tests that take no time: about a minute
	$(PYTEST) -m 'not slow and not costly'

test: $(VENV)/.test  ## Run the tests, but for those that take long
	$(PYTEST) -m 'not slow'

test-all: $(VENV)/.test  ## Run every test, all types checked at run time: several times as long
	$(PYTEST) --jaxtyping-packages=qdeploy,beartype.beartype

lint: $(VENV)/.lint  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## Remove the environment and what tools leave behind
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[test,lint]'
	touch $@
