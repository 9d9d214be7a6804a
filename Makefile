# The front door. `make demo` sets up and gets a first real answer; `make test` sets up and passes the tests.
PYTHON ?= python3
# Installed before everything else, so that nothing pulls another build of it. Where your index has a CPU build
# under another name, say so: make demo TORCH="torch==2.13.0+cpu".
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test check format bench parity fuzz soak kill-store sim sim-full clean answers bench-dht bench-hivemind partition gpu-check

help:
	@echo "make demo    set up, then ask a real model whose experts sit on three host processes"
	@echo "make test    set up, then run the tests"
	@echo "make check   lint, types, import rules"
	@echo "make format  let ruff rewrite what it can"
	@echo "make bench   parity, speed ratio and expert calls on this machine"
	@echo "make parity  tiny models of every architecture, split beside whole; writes docs/reference/architectures.md (7 minutes)"
	@echo "make fuzz    coverage-guided fuzzing of all that strangers' bytes reach (MINUTES=10 in all)"
	@echo "make answers ten answers at once on one node, beside one after another"
	@echo "make bench-dht  the DHT of 64 processes beside hivemind's (PEERS=64 ROUNDS=3); installs hivemind in .venv-hivemind"
	@echo "make bench-hivemind  one expert, twenty on ten hosts and a host's footprint beside hivemind and the floor (ROUNDS=3)"
	@echo "make gpu-check  on a machine with a GPU: parity with the processor, utilisation, tokens and calls a second"
	@echo "make partition  30 processes of which half stand still for five minutes (PEERS=30 MINUTES=5)"
	@echo "make soak    a swarm under a nemesis (MINUTES=30 HOSTS=4 REQUESTERS=3 SEED=0)"
	@echo "make sim     500 nodes in simulated time, 20 seconds; make sim-full 10,000 nodes, 20 minutes"
	@echo "make kill-store  kill -9 of a node that writes, 100 times; nothing acknowledged may be lost (KILLS=100)"
	@echo "make clean   remove the virtual environment and caches of this folder"

$(VENV)/torch.stamp:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "daaswarm needs Python 3.10 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)"
	touch $@

$(VENV)/run.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) install --quiet --editable .
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(PIP) install --quiet --editable ".[dev]"
	rm -rf $(VENV)/lib/python3*/site-packages/trio-stubs  # of an old trio (libp2p brings them); they hide trio's own types
	touch $@

demo: $(VENV)/run.stamp
	$(BIN)/daaswarm infer "What is the capital of France?" --embedded 3

test: $(VENV)/dev.stamp
	$(BIN)/python -m tests

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/run.stamp
	$(BIN)/daaswarm bench parity --hosts 2
	$(BIN)/daaswarm bench expert --expert nop --callers 1
	$(BIN)/daaswarm bench expert --expert nop --callers 64
	$(BIN)/daaswarm bench expert --expert ffn --callers 64

parity: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.architectures

$(VENV)/fuzz.stamp: $(VENV)/dev.stamp
	$(PIP) install --quiet --editable ".[fuzz]"
	touch $@

fuzz: MINUTES ?= 10
fuzz: $(VENV)/fuzz.stamp
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

soak: MINUTES ?= 30
soak: HOSTS ?= 4
soak: REQUESTERS ?= 3
soak: SEED ?= 0
soak: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES) --hosts $(HOSTS) --requesters $(REQUESTERS) --seed $(SEED)

answers: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.answers

.venv-hivemind/stamp: benchmarks/hivemind/install.sh
	bash benchmarks/hivemind/install.sh .venv-hivemind
	touch $@

bench-dht: PEERS ?= 64
bench-dht: ROUNDS ?= 3
bench-dht: $(VENV)/run.stamp .venv-hivemind/stamp
	$(BIN)/python -m benchmarks.dht_beside_hivemind --hivemind .venv-hivemind --peers $(PEERS) --rounds $(ROUNDS)

bench-hivemind: ROUNDS ?= 3
bench-hivemind: $(VENV)/dev.stamp .venv-hivemind/stamp
	$(BIN)/python -m benchmarks.beside_hivemind --hivemind .venv-hivemind --rounds $(ROUNDS) --plot beside-hivemind.png

partition: PEERS ?= 30
partition: MINUTES ?= 5
partition: $(VENV)/run.stamp
	$(BIN)/python -m benchmarks.partition --peers $(PEERS) --minutes $(MINUTES)

gpu-check: $(VENV)/run.stamp
	$(BIN)/python -m benchmarks.gpu_check

sim: $(VENV)/run.stamp
	$(BIN)/daaswarm bench sim --nodes 500 --users 2000 --minutes 2

sim-full: $(VENV)/run.stamp
	$(BIN)/daaswarm bench sim --nodes 10000 --experts 1000 --users 100000 --minutes 10 --churn 0.2 --seed 1

kill-store: KILLS ?= 100
kill-store: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.kill_store --kills $(KILLS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache
