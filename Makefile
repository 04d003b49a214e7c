# `make quickstart` and `make test` set up everything they need, virtual environment included.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA := shards/codes

.PHONY: quickstart test test-all faults check format docs clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(DATA)/metadata.json: | $(VENV)/installed
	$(BIN)/python data_prep/shortcuts.py codes $(DATA) --codes 64 --pairs-train 32768 --seed 2

# Two stages beside one of equal compute, where a shortcut hides the rest, on the CPU: the phases, and the table.
quickstart: $(VENV)/installed $(DATA)/metadata.json
	$(BIN)/mcl-clip experiment recipes/experiments/codes.py --out runs/quickstart --seeds 0 --arms mcl single --jobs 2 \
		--arguments="--stages.0.train.steps 500 --stages.1.train.steps 1000"
	$(BIN)/mcl-clip status runs/quickstart/seed-0/mcl

test: $(VENV)/installed
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadgroup

test-all: $(VENV)/installed
	$(BIN)/python -m pytest

# A hundred kills at random moments, and ten thousand broken inputs.
faults: $(VENV)/installed
	$(BIN)/python -m tests.faults.kills --kills 100
	$(BIN)/python -m tests.faults.nodes --epochs 100 --kills 10
	$(BIN)/python -m tests.faults.fuzz --cases 10000

# Lint, types and dead code.
check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/vulture

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Docstrings as pages, in build/docs. Names that the package loads when they are first used are loaded for pdoc.
MODULES := $(sort $(subst /,.,$(basename $(shell find mcl_clip -name '*.py' ! -name '__*'))))
LOADED := import mcl_clip; vars(mcl_clip).update({name: getattr(mcl_clip, name) for name in mcl_clip.__all__})
docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@$(BIN)/python -c '$(LOADED); from pdoc.__main__ import cli; cli()' \
		--docformat google --output-directory build/docs mcl_clip $(MODULES)

clean:
	rm -rf $(VENV) build *.egg-info
