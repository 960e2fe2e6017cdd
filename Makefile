# Set-up, demo and checks. Needs only Python 3.11 or newer with pip and venv, and make.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help venv demo test lint format docs clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

venv: $(STAMP) ## set up .venv with the package, its examples' and its tests' needs

# The stamp is written last, so a set-up that failed half-way is done again.
$(STAMP): pyproject.toml constraints.txt .ci/setup-venv
	@.ci/setup-venv "$(PYTHON)" .venv
	@touch $@

demo: venv ## train a small Llama in parallel on this machine, then generate with plain transformers
	@PYTHON=$(BIN)/python examples/stdlib_llama/run.sh

# Three tests at a time on two cores: while the ranks of one wait for each other, those of the others compute. A worker
# that has nothing left takes over tests of another.
test: venv ## run the whole test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist worksteal tests

lint: venv ## ruff, mypy and the order of the rooms, changing nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PYTHONPATH=. $(BIN)/lint-imports --no-logo --no-cache

format: venv ## let ruff fix and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: venv ## build the documentation into build/docs; a dead link fails
	@$(BIN)/python docs/settings/tables.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file docs/settings/mkdocs.yml
	@echo "The pages are in build/docs/index.html"

clean: ## remove .venv, caches and what the examples wrote
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache examples/*/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
