# `make run` serves the page, `make test` runs the tests, `make check` is the fast loop. Each installs what it needs.

PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: run check lint types fast test benchmark train-demo clean

run: .venv/installed-run
	$(BIN)/python app.py $(OPTIONS)

# Before every push: under 90 seconds on two idle cores.
check: lint types fast

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

# In two processes of one thread each: most tests wait for a program of their own to start, which takes one core. Files
# start in the order of conftest.py, the longest first. If a test ends its process, the run ends: pytest-xdist would start
# another process and could then wait forever.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

fast: .venv/installed-dev
	$(PYTEST) -m "not slow and not browser" $(OPTIONS)

test: .venv/installed-dev
	$(PYTEST) $(OPTIONS)

benchmark: .venv/installed-dev
	$(BIN)/python benchmarks/run.py

# From nothing to a page with weights of your own, on easy-VQA: see training_scripts/recipes/demo/.
DEMO := runs/demo

train-demo: .venv/installed-train
	rm -rf $(DEMO)
	$(BIN)/python training_scripts/prepare_data.py easy-vqa --split train --limit 800 --per-image 8 --turns 1 \
		--images $(DEMO)/pictures/train --folder train --out $(DEMO)/train.json
	$(BIN)/python training_scripts/prepare_data.py easy-vqa --split test --limit 30 --make questions \
		--images $(DEMO)/pictures/test --folder test --out $(DEMO)/test.json
	$(BIN)/python training_scripts/embed_images.py --images $(DEMO)/pictures --image-encoder efficientnet-lite0 \
		--out $(DEMO)/features
	$(BIN)/python training_scripts/pretrain_projector.py --recipe training_scripts/recipes/demo/1-projector.yaml
	$(BIN)/python training_scripts/finetune_qlora.py --recipe training_scripts/recipes/demo/2-adapter.yaml
	$(BIN)/python training_scripts/evaluate.py --weights $(DEMO)/weights --questions $(DEMO)/test.json \
		--features $(DEMO)/features --conditions real blank --limit 240 --no-perplexity
	@echo 'Chat with your weights: make run OPTIONS="--weights $(DEMO)/weights"'

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit("mmchat needs Python 3.11 or newer: name one with PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/installed-run: .venv/created requirements.txt constraints.txt pyproject.toml
	@echo "Installing what the app needs; the first time this takes a few minutes"
	$(PIP_INSTALL) -e .
	@touch $@

.venv/installed-train: .venv/installed-run
	@echo "Installing what training needs"
	$(PIP_INSTALL) -e '.[train]'
	@touch $@

.venv/installed-dev: .venv/installed-run
	@echo "Installing what the tests need"
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@
