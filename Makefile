# make train: an environment in .venv, fastvae in it, and a first VAE. make test: its test suite.
# Options: PYTHON=python3.12 make train; ARGS="--data digits --epochs 3" make train

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN = $(VENV)/bin
SOURCES = pyproject.toml CMakeLists.txt constraints.txt $(shell find fastvae kernels csrc -type f -not -name '*.pyc')

.PHONY: train test integration bench lint clean

train: $(VENV)/.installed
	$(BIN)/fastvae train --amp $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/pytest $(ARGS)

integration: $(VENV)/.installed-test,integration
	$(BIN)/pytest -m integration $(ARGS)

bench: $(VENV)/.installed-bench
	$(BIN)/pytest bench $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build

$(BIN)/python:
	@$(PYTHON) scripts/preflight.py
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --constraint constraints.txt .
	@touch $@

$(VENV)/.installed-%: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --constraint constraints.txt ".[$*]"
	@touch $(VENV)/.installed $@
