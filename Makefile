# `make demo` and `make test` are all a newcomer needs; both install what they need into .venv, once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# What runs GPU tests and benchmarks: `make test-gpu RUN=python3` uses an interpreter that has torch already, and installs nothing.
RUN    ?= $(BIN)/python
READY  := $(if $(filter $(BIN)/python,$(RUN)),$(STAMP))

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs tables test-gpu bench-h200 clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"mlakit needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}; try make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## measure every kind of batch on the best device there is (under three minutes)
	$(BIN)/mlakit bench --config quickstart

lint: $(STAMP) ## format check, lint, type check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP) ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: lint ## lint, type check and every CPU test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto --dist worksteal

docs: $(STAMP) ## build the documentation, with the reference, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

tables: $(STAMP) ## write the tables and plots of README and docs anew from results/
	$(BIN)/mlakit report --update README.md $$(find docs -name '*.md')

test-gpu: $(READY) ## the tests that need an NVIDIA GPU
	PYTHONPATH="src:$$PYTHONPATH" MLAKIT_TEST_GPU=1 $(RUN) -m pytest -p no:cacheprovider tests/gpu

bench-h200: $(READY) ## measure on this GPU and refresh results/h200
	PYTHONPATH="src:$$PYTHONPATH" $(RUN) benchmarks/h200/run_all.py

clean: ## remove what make and the tools left
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis
