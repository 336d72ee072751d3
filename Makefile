# What `make` does, in two commands: `make run` serves the page, `make test` runs the tests.

PYTHON ?= python3
BIN := .venv/bin
TEST_OPTIONS ?=

.PHONY: run test lint benchmark clean

run: .venv/installed-run
	$(BIN)/python app.py $(OPTIONS)

test: .venv/installed-dev
	$(BIN)/python -m pytest $(TEST_OPTIONS)

lint: .venv/installed-dev
	$(BIN)/ruff check .

benchmark: .venv/installed-dev
	$(BIN)/python benchmarks/chat.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("mmchat needs Python 3.11 or newer; name one with PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/installed-run: $(BIN)/python requirements.txt constraints.txt
	@echo "Installing what the app needs; the first time this takes a few minutes"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed-run pyproject.toml
	@echo "Installing what the tests need"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
