# SPDX-License-Identifier: MIT
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(wildcard c_ext/*.h c_ext/*.c c_ext/*.py) setup.py pyproject.toml
# Tests of what several threads do with the C core at once, and those whose C programs have threads.
THREADED := tests/ring tests/hypervisor tests/backend tests/frontend \
	$(addprefix tests/net/test_, vif.py vif_async.py multicast.py holding_back.py capture.py netctrl.py)
# Tests whose C programs `make test-aarch64` builds for another machine.
FOREIGN := $(addprefix tests/ring/test_, xen_macros.py interleavings.py many_ports.py stress.py xen_header.py flex.py) \
	tests/hypervisor/test_advisories.py

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz-xenstore engines test-sanitized test-thread-sanitizer test-aarch64 coverage stress linearizability devices integrity proofs fuzz-ring fuzz-net bench bench-xenstore lint stub clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): $(SOURCES) scripts/setup
	@scripts/setup "$(PYTHON)" $(VENV)
	@touch $@

demo: $(STAMP) ## Set everything up, then: a guest process reads and writes a real disk through the ring
	@$(BIN)/paravirt demo

test: $(STAMP) ## Set everything up, then run the tests
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test-sanitized: $(STAMP) ## Run the tests with a C core that looks for errors of memory and arithmetic (TESTS=...)
	@scripts/test-sanitized $(VENV) address $(or $(TESTS),tests)

test-thread-sanitizer: $(STAMP) ## Run the tests with threads with a C core that looks for races (TESTS=...)
	@scripts/test-sanitized $(VENV) thread $(or $(TESTS),$(THREADED))

test-aarch64: $(STAMP) ## Build the C core for aarch64 and run its C tests with qemu (FUZZ_RUNS=5000)
	@scripts/test-aarch64 $(VENV) $${FUZZ_RUNS:-5000} $(or $(TESTS),$(FOREIGN))

coverage: $(STAMP) ## Say how much of the C core the tests run; fails below 98 % of lines, 92 % of branches (TESTS=...)
	@$(BIN)/python -m tests.coverage $(TESTS)

fuzz-xenstore: $(STAMP) ## Fuzz xenstored's C engine at length (FUZZ_RUNS=1000000 in all)
	@$(BIN)/python -m tests.xenstore.fuzz.build $${FUZZ_RUNS:-1000000}

engines: $(STAMP) ## Tell both engines of xenstored the same at length (ENGINES_ROUNDS=3000)
	@ENGINES_SEED=$${ENGINES_SEED:-1000} ENGINES_ROUNDS=$${ENGINES_ROUNDS:-3000} $(BIN)/python -m pytest -q \
		tests/xenstore/test_engines.py

stress: $(STAMP) ## Check 10^9 messages through a ring in each place with each fence (STRESS_MESSAGES=1000000000)
	@STRESS_MESSAGES=$${STRESS_MESSAGES:-1000000000} $(BIN)/python -m pytest -q tests/ring/test_stress.py

linearizability: $(STAMP) ## Look long for a history of the store that has no order (LINEARIZABILITY_ROUNDS=20)
	@LINEARIZABILITY_ROUNDS=$${LINEARIZABILITY_ROUNDS:-20} $(BIN)/python -m pytest -q \
		tests/xenstore/test_linearizability.py tests/xenstore/test_crash_journal.py

devices: $(STAMP) ## Let devices come and go, at length, and look for what stays behind (DEVICE_ROUNDS=1000 IDLE_DEVICES=500)
	@DEVICE_ROUNDS=$${DEVICE_ROUNDS:-1000} IDLE_DEVICES=$${IDLE_DEVICES:-500} $(BIN)/python -m pytest -q \
		tests/integration/test_connect_faults.py tests/net/test_vif_many.py -k "come_and_go or idle"

integrity: $(STAMP) ## fio and ext4 on exported disks, in peace and while backends are killed (INTEGRITY_SECONDS=300 for each of 4)
	@INTEGRITY_SECONDS=$${INTEGRITY_SECONDS:-300} INTEGRITY_SEED=$${INTEGRITY_SEED:-$$(date +%s)} $(BIN)/python -m pytest \
		-v -s tests/integration/test_integrity.py

fuzz-ring: $(STAMP) ## Fuzz rings, streams, grants, event words and what Dom0 looks at, at length (FUZZ_RUNS=10000000)
	@$(BIN)/python -m tests.ring.fuzz $${FUZZ_RUNS:-10000000}

fuzz-net: $(STAMP) ## Fuzz both halves of network devices, offloads and the switch, at length (FUZZ_RUNS=10000000)
	@$(BIN)/python -m tests.net.fuzz $${FUZZ_RUNS:-10000000}

proofs: $(STAMP) ## Models, every schedule, symbolic proofs, all at length (10 to 20 minutes, 6 GiB)
	@$(BIN)/python -m tests.proofs.spin
	@$(BIN)/python -m tests.proofs.mutants
	@$(BIN)/python -m tests.proofs.prove

bench: $(STAMP) ## Measure the marks against their peers (prints met, missed or inconclusive)
	@$(BIN)/python -m benchmarks

bench-xenstore: $(STAMP) ## Compare xenstored with the C xenstored and oxenstored, at length
	@$(BIN)/python -m benchmarks.xenstore

lint: $(STAMP) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

stub: $(STAMP) ## Write src/ring/_core.pyi anew from the C headers
	@$(BIN)/python c_ext/stub.py > src/ring/_core.pyi
	@$(BIN)/ruff format -q src/ring/_core.pyi

clean: ## Remove what was built
	rm -rf $(VENV) build src/ring/_core*.so src/frontend/_nbdkit*.so .mypy_cache .ruff_cache .pytest_cache *.egg-info src/*.egg-info
