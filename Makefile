# Every target sets up what it needs: Python 3.11, make and a package index are enough.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
LOADS_SCALED   := reference@0.05,agents@0.1,hot-prefix@0.2,all-unique@0.2,tenants@0.2,bursts@0.2
LOADTEST_FILES := --rows build/loadtest.json --json build/loadtest/runs.json --html build/loadtest.html

.DEFAULT_GOAL := help
.PHONY: help setup demo up up-redis test check proto test-vllm bench curves soak chaos loadtest loadtest-full image clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "KV Atlas needs Python 3.11 or later; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "setting up $(VENV) (once, about a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

setup: $(VENV)/.ready ## make the virtual environment

demo: setup ## three simulated engines: the same prompt finds its engine again; precise against random
	@$(BIN)/kvatlas demo

up: setup ## indexer and router in one process, with three simulated engines
	@$(BIN)/kvatlas up --simulate 3

test: setup ## all tests that need nothing installed
	@$(BIN)/python -m pytest -q -n 3 --dist worksteal

check: setup ## ruff, mypy, import contracts, generated stubs
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python libs/common/kvatlas_common/proto/generate.py --check

proto: setup ## generate the gRPC stubs anew
	@$(BIN)/python libs/common/kvatlas_common/proto/generate.py

up-redis: setup ## the same on a real Valkey, started here for as long as it runs
	@$(BIN)/python -m kvatlas_loadtest.valkey -- $(BIN)/kvatlas up --simulate 3 --store '{url}'

bench: setup ## every budget measured, beside a peer where there is one (build/bench.json; 5 minutes)
	@$(BIN)/python -m kvatlas_loadtest.bench --json build/bench.json

curves: setup ## what grows with what, measured in bounded time (build/curves.json; 3 minutes)
	@$(BIN)/python -m kvatlas_loadtest.bench.curves --json build/curves.json

soak: setup ## steady load on real processes: memory flat, nothing left behind (build/soak.json; 10 minutes)
	@$(BIN)/python -m kvatlas_loadtest.soak --json build/soak.json

chaos: setup ## faults on real processes, held to the engines' own block tables (build/chaos.json; 12 minutes)
	@$(BIN)/python -m kvatlas_loadtest.chaos --json build/chaos.json

loadtest: setup ## policies compared on simulated fleets, scaled (build/loadtest.json and .html; 5 minutes)
	@$(BIN)/python -m kvatlas_loadtest.loads simulate --workload $(LOADS_SCALED) --policy all --variants --seeds 1,2,3 $(LOADTEST_FILES)

loadtest-full: setup ## the same, the whole reference benchmark with grids and five seeds (an hour; build/loadtest.json and .html)
	@$(BIN)/python -m kvatlas_loadtest.loads simulate --workload reference --policy all --grid --seeds 1,2,3,4,5 $(LOADTEST_FILES)

image: ## the container image (needs a Docker daemon)
	docker build -f deploy/docker/Dockerfile -t kvatlas:$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) .

test-vllm: setup ## the acceptance on real vLLM engines (KVATLAS_VLLM names its virtual environment)
	@$(BIN)/python -m pytest -q -m vllm tests/live -s

clean: ## forget the virtual environment and what was built
	rm -rf $(VENV) build dist
