# `make demo` and `make test` do everything, virtual environment included.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test slow targets check docs lint types clean

demo: $(READY)
	$(BIN)/exitkit demo

# One process per core, one thread each: the tests are many small models.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadscope

# Everything but the slow tests.
test: $(READY)
	$(PYTEST) -m "not slow"

# What takes more than three seconds by itself (tests/durations.txt): CI runs it after the rest, and prints what took longest.
slow: $(READY)
	$(PYTEST) -m slow --durations=25

# Export for ExecuTorch and OpenVINO, whose packages come only now: they are large, and few need them.
targets: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[executorch,openvino]'
	$(PYTEST) tests/test_executorch.py tests/test_openvino.py

# The daily loop, in a minute and a half: lint, types, and the tests of small models in eager mode.
check: lint types
	$(PYTEST) -m "not slow and not seconds"

# The site, in site/.
docs: $(READY)
	$(BIN)/mkdocs build --strict

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# torch goes in first, by its pinned version, so that nothing else pulls in another build of it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all]'
	touch $@

clean:
	rm -rf $(VENV)
