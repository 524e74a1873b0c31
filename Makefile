# `make` lists what there is. Everything installs itself into .venv on first use, from requirements-dev.lock.

PYTHON ?= python3
UV_VERSION := 0.13.9
BIN := .venv/bin
INSTALLED := .venv/installed

.DEFAULT_GOAL := help
.PHONY: help demo dev be worker scheduler courier up test check format docs lock clean
.PHONY: chaos soak model simulation bench

help:
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo

##@ Try it
demo: $(INSTALLED) ## a worker, a few jobs, their results; then it cleans up after itself
	$(BIN)/laneway demo

dev: $(INSTALLED) ## everything on this machine: API, worker, scheduler, SQLite, its own Redis
	$(BIN)/laneway dev

##@ Run one process (stores: LANEWAY_DATABASE_URL, LANEWAY_REDIS_URL)
be: $(INSTALLED) ## the HTTP API
	$(BIN)/laneway api

worker: $(INSTALLED) ## drains the lanes
	$(BIN)/python worker.py

scheduler: $(INSTALLED) ## everything that falls due
	$(BIN)/python scheduler.py

courier: $(INSTALLED) ## delivers webhooks
	$(BIN)/laneway courier

up: ## all of it in containers, with PostgreSQL and Redis
	docker compose up --build

##@ Change it
test: $(INSTALLED) ## all tests, against real servers they start themselves
	$(BIN)/pytest -n 3 --dist loadgroup

check: $(INSTALLED) ## style, types, import contracts, unit tests: under two minutes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest tests/unit -q

format: $(INSTALLED) ## put the code into its one form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED) ## write the reference pages from the code
	$(BIN)/laneway docs

lock: $(INSTALLED) ## write both lock files anew, with hashes, for every platform we run on
	$(BIN)/pip install --quiet uv==$(UV_VERSION)
	$(BIN)/uv pip compile pyproject.toml --extra embedded $(COMPILE) --output-file requirements.lock
	$(BIN)/uv pip compile pyproject.toml --extra embedded --group dev $(COMPILE) --output-file requirements-dev.lock

clean: ## remove what was installed, built or cached; data folders stay
	rm -rf .venv build dist backend/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

##@ Put it to the proof
chaos: $(INSTALLED) ## break real processes, servers and networks: three seeds, under four minutes
	PYTHONPATH=tests $(BIN)/python -m chaos --smoke

soak: $(INSTALLED) ## the same before a release: 20 seeds, then load without faults, about an hour
	PYTHONPATH=tests $(BIN)/python -m chaos --soak

model: $(INSTALLED) ## both stores against a model: 100,000 random steps each, then four processes at once
	PYTHONPATH=tests $(BIN)/python -m model

simulation: $(INSTALLED) ## 50,000 seeds of the protocol in virtual time: twelve minutes of a core
	PYTHONPATH=tests $(BIN)/python -m simulation --seeds 50000

bench: $(INSTALLED) ## measure; wants a quiet machine
	PYTHONPATH=tests $(BIN)/python -m bench

COMPILE := --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--custom-compile-command "make lock"

$(INSTALLED): requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Laneway needs Python 3.11 or later, and '$(PYTHON)' is not. Name another: make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
