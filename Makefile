# Two commands do everything: `make demo` (install, model, run) and `make check` (all that CI runs).
BIN := .venv/bin
BENCHMARKS := single against hop model-write lab memory api core members train plan

.PHONY: help demo check check-full check-faults check-gpu lint test swarm api-table pages clean $(BENCHMARKS:%=bench-%)

help:
	@echo "make demo         three devices on this machine answer a prompt"
	@echo "make check        everything CI runs, in minutes"
	@echo "make check-full   the long tests too"
	@echo "make check-faults members as real processes in the lab: cuts, kills, freezes, sleep, new addresses"
	@echo "make check-gpu    ggml with Vulkan (compiled in minutes): the same tokens on a graphics processor and in mixed rings"
	@echo "make swarm        SEEDS=10000 simulated clusters with faults, FIRST=0; all cores"
	@echo "make bench-NAME   $(BENCHMARKS); QUICK=1 takes less than a minute"
	@echo "make api-table    docs/api.md anew, from the tests of the API"
	@echo "make pages        docs/protocols anew, from the tables in the code"
	@echo "make clean        remove what these commands made"

demo:
	@scripts/install use
	@$(BIN)/shoal demo $(ARGS)

check: lint test

lint:
	@scripts/install dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test:
	@scripts/install dev
	$(BIN)/pytest -m "not full"

api-table:
	@scripts/install dev
	$(BIN)/python -m tests.serving.support_table

pages:
	@scripts/install dev
	$(BIN)/python -m shoal.lab.protocol_pages docs/protocols

check-full: lint
	$(BIN)/pytest

check-faults:
	@scripts/install dev
	$(BIN)/pytest -v tests/lab/test_member_faults.py

check-gpu:
	@scripts/install-gpu
	@# Of processors that play a graphics processor ggml takes only those that are named.
	GGML_VK_VISIBLE_DEVICES=$${GGML_VK_VISIBLE_DEVICES:-0} .venv-gpu/bin/pytest -v tests/gpu

$(BENCHMARKS:%=bench-%):
	@scripts/install dev
	@$(BIN)/python -m benchmarks.$(subst -,_,$(@:bench-%=%))

swarm:
	@scripts/install dev
	@$(BIN)/python -m shoal.simulation.swarm --seeds $(or $(SEEDS),10000) --first $(or $(FIRST),0)

clean:
	rm -rf .venv .venv-gpu .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
