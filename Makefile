# The whole of vaeq in a few words; `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help run test lint bench soak lock audit clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(READY) ## answer the question: sweep latent_dim=2,8,32, then the report
	$(BIN)/vaeq sweep latent_dim=2,8,32
	$(BIN)/vaeq report runs=outputs/default

test: $(READY) ## run the tests
	$(BIN)/python -m pytest

lint: $(READY) ## check formatting, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY) ## measure speed and memory, as ratios against baselines
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/python -m tests.benchmarks

soak: $(READY) ## the tests that inject faults, thousands of times
	VAEQ_SOAK=1 $(BIN)/python -m pytest -m soak

lock: $(READY) ## write .ci/lock.txt: the versions that lie in .venv, with the hashes of their files
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[lock]'
	$(BIN)/python -m pip freeze --exclude-editable > .venv/installed.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	  --no-annotate --extra flow --extra dev --constraints .venv/installed.txt \
	  --output-file .ci/lock.txt pyproject.toml

audit: $(READY) ## ask whether the versions in .ci/lock.txt have known vulnerabilities
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[lock]'
	$(BIN)/python -m tests.supply_chain audit

clean: ## remove the environment and the caches; outputs stay
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "vaeq needs Python 3.11 to 3.13; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
