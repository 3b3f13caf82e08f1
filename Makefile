PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKSPACE ?= workspace
DATA ?=
# Of the demonstration: streams (separate logs of actions) or simulated (one log with labels).
PRESET ?= streams
DATE ?=
STAMP := $(VENV)/.installed
# Test files side by side, one thread each: as many at once as there are cores, in the order of
# `tests/conftest.py`.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest
SIDE_BY_SIDE = -n auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow lint docs install clean

demo: install
ifeq ($(strip $(DATA)),)
	$(BIN)/mtl-ranker simulate --preset $(PRESET) --out $(WORKSPACE)/$(PRESET)-feed
	$(BIN)/mtl-ranker nightly --config $(PRESET) --data $(WORKSPACE)/$(PRESET)-feed --workspace $(WORKSPACE)/$(PRESET) $(if $(DATE),--date $(DATE))
else
	$(BIN)/mtl-ranker nightly --config kuairand --data $(DATA) --workspace $(WORKSPACE)/kuairand $(if $(DATE),--date $(DATE))
endif

test: install
	$(PYTEST) $(SIDE_BY_SIDE)

# Of faults and mutants a quarter, others on the next days; all with MTL_RANKER_ALL_CASES=1.
test-slow: install
	$(PYTEST) -m slow --durations=30 $(SIDE_BY_SIDE)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/sqlfluff lint sql

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): 2.4 GB, a few minutes"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,nightly,servers,studies,cluster,stores,onnx,docs]'
	$(BIN)/python -m mtl_ranker.commands.databases
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(WORKSPACE) site
