# `make help` lists the targets. Everything runs in .venv, which the targets make and keep up to date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test lint format bench clean

help: ## List the targets.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(STAMP) ## Make the virtual environment, or bring it up to date (6 GB, some minutes the first time).

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): 6 GB, some minutes the first time ..."
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo]'
	@touch $@

demo: $(STAMP) ## Encode a small corpus, decode it, and write demo-out/report.html.
	$(BIN)/cotam demo demo-out

test: $(STAMP) ## Run the tests.
	$(BIN)/python -m pytest -m "not slow"

lint: $(STAMP) ## Check style, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Format the code and sort its imports.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Run the benchmarks of entropy coding and encoding.
	$(BIN)/python benchmarks/rans.py
	$(BIN)/python benchmarks/encode.py

clean: ## Remove the virtual environment and what runs left behind.
	rm -rf $(VENV) demo-out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
