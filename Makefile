# Two commands on a fresh machine with git, make and python3-venv: `make demo` and `make test`.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTHON ?= python3
JOBS ?= 2

.PHONY: demo test lint types unit clean

demo: $(READY)
	$(BIN)/mixmix demo -o mixmix-demo --force

# mypy keeps one core busy, and the tests two: side by side they fill both.
test: lint
	$(MAKE) --no-print-directory --jobs=2 --output-sync=line types unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy
	cd benchmarks && MYPYPATH=.. $(abspath $(BIN))/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache .

# Times are taken with nothing beside them, and only the files that take any are read again.
unit: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not timing"
	$(BIN)/python -m pytest -m timing $$(grep -rl --include='*.py' 'mark\.timing' tests)

# Installed once; again only when the dependencies change. Python compiles what is imported when it is, and keeps that
# here whatever is usual elsewhere: to compile all of torch takes a minute, and what is imported, seconds a process.
unexport PYTHONDONTWRITEBYTECODE
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) mixmix-demo build *.egg-info
