# `make quickstart` and `make test` set up everything they need, virtual environment included.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA := shards/trifeature

.PHONY: quickstart test test-all check format clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(DATA)/metadata.json: | $(VENV)/installed
	$(BIN)/python data_prep/trifeature.py $(DATA) --pairs-train 12000 --size-px 32

# Three stages on rendered pictures, on the CPU, then the table of what each stage learned.
quickstart: $(VENV)/installed $(DATA)/metadata.json
	$(BIN)/python recipes/quickstart.py

test: $(VENV)/installed
	$(BIN)/python -m pytest -m 'not slow'

test-all: $(VENV)/installed
	$(BIN)/python -m pytest

# Lint and types.
check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info
