# Each target first sets up .venv if necessary. PYTHON=/path/to/python3.12 chooses the interpreter.
.PHONY: help quickstart test fast test-all lint format docs setup clean

BIN = .venv/bin
# Tests use small tensors in several processes. More threads per process would only compete for the cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest

help:
	@echo 'make quickstart  pretrain on photographs for a few minutes, then probe the features'
	@echo 'make test        run the linter, the type checker and the fast tests'
	@echo 'make test-all    run the slow tests too'
	@echo 'make format      format the code'
	@echo 'make docs        write the documents as a site to build/site'

quickstart:
	@.ci/setup.sh
	$(BIN)/mimae pretrain configs/quickstart.yaml run.dir=runs/quickstart
	$(BIN)/mimae probe runs/quickstart

# mypy uses one core. The tests begin at the same time, in three processes, since some of them wait: two cores have work.
test: setup
	@$(MAKE) --no-print-directory -j2 lint fast

fast: setup
	$(PYTEST) -m 'not slow and not gpu' -n 3 --dist loadfile --durations=10

test-all: lint
	$(PYTEST) --durations=20

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

setup:
	@.ci/setup.sh dev

clean:
	rm -rf .venv build dist mimae/_C.* *.egg-info .pytest_cache .ruff_cache .mypy_cache
