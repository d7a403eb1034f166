# Forebay. Every target prepares what it needs; `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
LOCK := locks/dev.txt
STAMP := $(VENV)/.installed
# Where engines, models and keys of this checkout live.
export FOREBAY_HOME ?= $(CURDIR)/.forebay
# Every start reads compiled modules, whatever the shell says: without them one takes more than twice as long.
unexport PYTHONDONTWRITEBYTECODE
SOURCES := gateway engines adapters tests loadtests

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): $(LOCK) pyproject.toml scripts/prepare
	@scripts/prepare "$(PYTHON)" "$(VENV)" "$(LOCK)"

.PHONY: setup
setup: $(STAMP) ## Prepare the gateway's environment

.PHONY: serve
serve: $(STAMP) ## Serve a small real model on this machine: gateway, engine and a fresh key
	@exec $(BIN)/forebay serve

.PHONY: fmt
fmt: $(STAMP) ## Format the code
	@$(BIN)/ruff format $(SOURCES)
	@$(BIN)/ruff check --fix $(SOURCES)

.PHONY: check
check: $(STAMP) ## Formatter, linter, strict types and import contracts
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/lint-imports

.PHONY: test-fast
test-fast: $(STAMP) ## The suite without the real engine
	@$(BIN)/python -m pytest -n 3 --dist worksteal -m "not real_engine and not all_engines and not load"

.PHONY: test
test: check ## Everything: checks and the whole suite, the real engine included
	@$(BIN)/python -m pytest -n 3 --dist worksteal -m "not real_engine and not all_engines and not load"
	@$(BIN)/python -m pytest -m real_engine

.PHONY: test-engines
test-engines: $(STAMP) ## The conformance suite, and all else about engines, on every engine; sets them up first
	@$(BIN)/python -m pytest tests/engines

.PHONY: bench
bench: $(STAMP) ## Compare with nginx and a naive gateway; PEERS="sglang-router smg" installs and adds those
	@$(BIN)/python -m loadtests.bench.run $(if $(PEERS),--peers $(shell echo $(PEERS) | tr ' ' ',')) $(ARGS)

.PHONY: examples
examples: $(STAMP) ## Every property test, with ten times as many examples as the suite draws
	@FOREBAY_EXAMPLES=10 $(BIN)/python -m pytest -n 3 --dist worksteal -m "hypothesis and not load"

.PHONY: load
load: $(STAMP) ## Clients that leave at every stage; replicas on one store of limits, under every fault; a scenario under locust
	@CLIENTS=10000 $(BIN)/python -m pytest -s tests/engines/simulated/test_accounts.py
	@$(BIN)/python -m pytest -s -m load

.PHONY: soak
soak: $(STAMP) ## Five minutes of everything at once: gateways, stores and two real engines, killed and stopped under load
	@$(BIN)/python -m loadtests.soak.run $(ARGS)

.PHONY: simulation
simulation: $(STAMP) ## Compare policies in simulation, for a minute; ARGS="systems routers" runs whole tables, ARGS=--help says which
	@$(BIN)/python -m loadtests.simulation.run $(ARGS)

.PHONY: docs
docs: $(STAMP) ## Write the tables of docs/engines.md anew from what the engines declare
	@$(BIN)/forebay engines table --write docs/engines.md

.PHONY: lock
lock: $(STAMP) ## Resolve the lock files anew from pyproject.toml
	@$(BIN)/uv pip compile -q --upgrade --generate-hashes --no-emit-index-url --no-header --python-version 3.11 \
		pyproject.toml -o locks/gateway.txt
	@$(BIN)/uv pip compile -q --upgrade --generate-hashes --no-emit-index-url --no-header --python-version 3.11 \
		pyproject.toml --extra dev -o locks/dev.txt

.PHONY: clean
clean: ## Remove environments, engines and caches of this checkout
	rm -rf $(VENV) .forebay .cache .mypy_cache .ruff_cache .hypothesis loadtests/bench/build tests/clients/node/node_modules
