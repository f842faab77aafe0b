# `make demo` and `make test` do all set-up on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
CLIENTS := $(VENV)-clients
BIN := $(VENV)/bin
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt
PIP := $(BIN)/python $(INSTALL)
# transformers' own tests, of the version that is installed
SDIST = sdist=$$($(BIN)/python scripts/fetch_transformers_tests.py .cache/transformers-tests) && TRANSFORMERS_SDIST=$$sdist
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal
# The oldest transformers that pyproject.toml allows, and the tests that depend on its version.
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
ON_OLDEST := $(addprefix tests/test_, adapters.py compat.py configuration_skywork.py generation_and_training.py \
	modeling_skywork.py modeling_skywork_moe.py placement_dispatch.py quantization.py registration.py \
	tokenization_skywork.py weights.py) tests/transformers_common

.PHONY: demo test build-kernels test-oldest test-clients soak lint types style check clean installed-dev installed-clients

demo: $(VENV)/installed
	$(BIN)/skywork-hf demo

test: $(VENV)/installed-dev
	$(SDIST) $(PYTEST)

# Every GPU kernel for every generation of cards, which needs none of them.
build-kernels: $(VENV)/installed-dev
	$(BIN)/python scripts/build_triton_kernels.py

test-oldest: $(VENV)/installed-dev .cache/transformers-$(OLDEST)
	export PYTHONPATH=$(CURDIR)/.cache/transformers-$(OLDEST) && $(SDIST) $(PYTEST) -k "not fsdp and not hsdp and not test_tp and not test_ep and not overfit" $(ON_OLDEST)

# What kills, races and random input do, at full size; `make test` has a small version of each.
soak: $(VENV)/installed-dev
	$(PYTEST) -m soak

# The real programs that load us, in an environment of their own: they bring what changes other tests.
test-clients: $(CLIENTS)/installed
	$(CLIENTS)/bin/python -m pytest -n auto --dist worksteal tests/clients

installed-dev: $(VENV)/installed-dev

installed-clients: $(CLIENTS)/installed

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

style: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint types build-kernels soak test-oldest test-clients test

clean:
	rm -rf $(VENV) $(CLIENTS) .cache dist

.cache/transformers-$(OLDEST): $(VENV)/made
	$(PIP) --no-deps --target $@ "transformers==$(OLDEST)"
	touch $@

$(VENV)/made:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/made pyproject.toml constraints.txt
	@echo "Installing skywork-hf into $(VENV); the first time this takes some minutes."
	$(PIP) -e ".[cpu]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -e ".[dev]"
	touch $@

$(CLIENTS)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python $(INSTALL) -e ".[clients]"
	touch $@
