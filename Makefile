# Everything here sets itself up: `make run` on a fresh machine needs Python 3.10+ and a package index, nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Whole files in parallel, one thread each: two busy torch processes of several threads stall each other.
TESTS  := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help run run-cifar10 data test test-all attacks lint format type check coverage notebooks docs docs-links study study-pages bench wheel wandb-sync clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(READY) ## the main job on the bundled digits: three teachers, one branched student (minutes)
	$(BIN)/ekd-train experiment=quick

run-cifar10: $(READY) ## the same on real CIFAR-10 with 10 % of the labels (downloads data and teachers)
	$(BIN)/ekd-train experiment=cifar10_limited

data: $(READY) ## obtain CIFAR-10 and check it against the published MD5s
	$(BIN)/ekd-data cifar10

test: $(READY) ## lint, types and all tests but the slow ones
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(TESTS)

test-all: $(READY) ## the slow tests, too
	$(TESTS) -m "not attacks"

attacks: $(READY) ## damaged files and killed programs by the hundred, and how often each ended in which way (half an hour)
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/attacks -m "attacks or not attacks"

lint: $(READY) ## ruff
	$(BIN)/ruff check .

format: $(READY) ## ruff format, and import order
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

type: $(READY) ## mypy
	$(BIN)/mypy

check: $(READY) ## all pre-commit hooks on all files
	PATH="$(abspath $(BIN)):$$PATH" pre-commit run --all-files

coverage: $(READY) ## tests with coverage; which lines ran stands in htmlcov/
	$(TESTS) --cov --cov-report=term --cov-report=html

notebooks: $(READY) ## make the notebooks from their scripts
	$(BIN)/python notebooks/tools/generate.py

docs: $(READY) ## build the documentation site into docs/_build/html; warnings and broken local links are errors
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -b html docs docs/_build/html

docs-links: $(READY) ## ask every address in the documentation whether it is there (needs internet)
	$(BIN)/sphinx-build --quiet -b linkcheck docs docs/_build/linkcheck

STUDY ?= full
study: $(READY) ## the study that conf/study/$(STUDY).yaml declares, stopped and continued at will: ONLY=cifar10-10,ekd OVERRIDES="trainer=gpu"
	$(BIN)/ekd-compare --study $(STUDY) --output runs/study/$(STUDY) $(if $(ONLY),--only $(ONLY)) $(OVERRIDES)

study-pages: $(READY) ## docs/results/study from its records, and what runs/study holds besides; the README's table, too
	$(BIN)/ekd-report docs/results/study/*.jsonl $(wildcard runs/study/full) -o docs/results/study --study-pages --study full --force
	$(BIN)/python docs/tools/readme_table.py docs/results/study README.md

bench: $(READY) ## this machine's speed against a plain PyTorch loop, on the bundled digits
	$(BIN)/ekd-bench

wheel: $(READY) ## build the wheel into dist/
	$(BIN)/python -m build --wheel

RUNS ?= outputs multirun
wandb-sync: $(READY) ## upload W&B runs that were made offline, below RUNS="outputs multirun"
	@set --; for place in $(RUNS); do [ ! -d "$$place" ] || set -- "$$@" "$$place"; done; \
	if [ $$# -eq 0 ] || [ -z "$$(find "$$@" -type d -name 'offline-run-*' -print -quit)" ]; then \
		echo 'no offline runs below $(RUNS)'; \
	else find "$$@" -type d -name 'offline-run-*' -exec $(BIN)/wandb sync {} +; fi

clean: ## remove what was built, but no data, store or results
	rm -rf build dist docs/_build docs/generated src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage* htmlcov

# The stamp depends on pyproject.toml: changed dependencies are installed, unchanged ones cost nothing.
$(READY): pyproject.toml
	@echo 'installing the project and its tools into $(VENV): a few minutes, the first time'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
