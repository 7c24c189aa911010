PYTHON ?= python3.11
PORT ?= 8000
SEED ?= 2
PROMPT = a red circle moving right
export PROMPT
BIN := .venv/bin
export RAY_AUTH_MODE := token
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: setup demo serve test test-all test-unit test-parallel test-database test-serve test-k8s lint format \
	bench train-demo train-additions

setup: .venv/.ready

# TORCH_ARGS: on Linux without a GPU, --extra-index-url https://download.pytorch.org/whl/cpu
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		$(TORCH_ARGS) --editable '.[dev]'
	touch $@

demo: setup
	@$(BIN)/python -m client.demo "$$PROMPT"

serve: setup
	@exec $(BIN)/python -m deployments.launch --port $(PORT)

# What starts no cluster, by several processes; clusters have the machine to themselves.
SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 \
	--dist loadfile --ignore tests/serve

test: setup
	$(SIDE_BY_SIDE) -m "not long"
	$(BIN)/python -m pytest -m "not long" tests/serve

# A process that was the driver of one cluster does not always get to know another one's nodes, so
# the packages that start nodes themselves have one each.
OWN_NODES := tests/serve/nodes tests/serve/nodes_by_tier
CLUSTERS = $(BIN)/python -m pytest $(OWN_NODES:%=--ignore %) tests/serve \
	$(foreach package,$(OWN_NODES),&& $(BIN)/python -m pytest $(package))

test-all: setup
	$(SIDE_BY_SIDE)
	$(CLUSTERS)

test-unit: setup
	$(BIN)/python -m pytest tests/unit

test-parallel: setup
	$(BIN)/python -m pytest tests/parallel

test-database: setup
	$(BIN)/python -m pytest tests/database

test-serve: setup
	$(CLUSTERS)

test-k8s: setup
	$(BIN)/python -m pytest tests/k8s

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python -m bench.prompt_adherence
	$(BIN)/python -m bench.step_cache
	$(BIN)/python -m bench.families
	$(BIN)/python -m bench.fit
	$(BIN)/python -m bench.cluster_tax
	$(BIN)/python -m bench.ledger_contention
	$(BIN)/python -m bench.admission
	$(BIN)/python -m bench.fault_points
	$(BIN)/python -m bench.denoise_shards
	$(BIN)/python -m bench.recovery
	$(BIN)/python -m bench.preemption
	$(BIN)/python -m bench.parallel_plans
	$(BIN)/python -m bench.money_simulation --seeds 5
	$(BIN)/python -m bench.money_simulation --seeds 5 --database postgresql

train-demo: setup
	$(BIN)/python -m training --seed $(SEED)

train-additions: setup
	$(BIN)/python -m training.additions --seed $(SEED)

.PHONY: image
image:
	docker build --tag mutoscope:0.1.0 .
