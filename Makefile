# Two commands do everything: `make demo` (install, model, run) and `make check` (all that CI runs).
BIN := .venv/bin

.PHONY: help demo check check-full lint test bench-single bench-hop clean

help:
	@echo "make demo         three devices on this machine answer a prompt"
	@echo "make check        everything CI runs, in minutes"
	@echo "make check-full   the long tests too"
	@echo "make bench-NAME   single, hop; QUICK=1 takes less than a minute"
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

check-full: lint
	$(BIN)/pytest

bench-single bench-hop:
	@scripts/install dev
	@$(BIN)/python -m benchmarks.$(@:bench-%=%)

clean:
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
