# Everything runs in a virtual environment of its own, .venv, made on first use with python3 (3.11 or newer).
# `make demo PYTHON=python3.12` chooses another interpreter; `make clean` removes what was made.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0

# One thread for each of the two test processes: more only get into each other's way.
TEST_JOBS ?= 2

.PHONY: demo test lint format types package tables docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.core
	$(BIN)/python -m quantkit.eval.before_after demo --text demo --max-tokens 16384 --keep demo-out

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev
	$(BIN)/mypy

# A wheel holds what a checkout holds: built, unpacked elsewhere, and used from there.
package: $(VENV)/.core
	rm -rf build
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(BIN)/pip install --quiet --no-deps --target build/installed build/wheel/*.whl
	cd build/installed && ../../$(BIN)/python -I ../../.ci/check_package.py .

# What README.md and eval/results/README.md show of eval/results; a test fails when they are not what the files say.
tables: $(VENV)/.core
	$(BIN)/python -m quantkit.eval.generated

# The documentation into site/; a warning is an error. Nothing that is generated from the code is kept (docs/generate.py).
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build site demo-out *.egg-info

# The stamps: an environment is made again only when what it was made from has changed.
$(VENV)/.core: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "quantkit needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Choose one with: make PYTHON=python3.12")'
	@echo "making $(VENV) with $$($(PYTHON) --version): $(TORCH) and quantkit"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH) -e . -c constraints.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "adding what the tests need"
	$(BIN)/pip install --quiet $(TORCH) -e '.[dev,eval,report,portable]' -c constraints.txt
	@touch $@

$(VENV)/.docs: $(VENV)/.core
	@echo "adding what the documentation needs"
	$(BIN)/pip install --quiet $(TORCH) -e '.[docs]' -c constraints.txt
	@touch $@
