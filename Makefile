# `make run` serves the page, `make test` runs the tests. Each sets up what it needs the first time.

PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: run test lint benchmark clean

run: .venv/installed-run
	$(BIN)/python app.py $(OPTIONS)

test: .venv/installed-dev
	$(BIN)/python -m pytest $(OPTIONS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

benchmark: .venv/installed-dev
	$(BIN)/python benchmarks/chat.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit("mmchat needs Python 3.11 or newer: name one with PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/installed-run: .venv/created requirements.txt constraints.txt pyproject.toml
	@echo "Installing what the app needs; the first time this takes a few minutes"
	$(PIP_INSTALL) -e .
	@touch $@

.venv/installed-dev: .venv/installed-run
	@echo "Installing what the tests need"
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@
