# make install | train | test | test-all | lint | docs | clean.   make train ARGS='attention=mla steps=100'
# make test TIER=unit, or laws, or system: see tests/README.md

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: install train test test-all lint docs clean

install: $(READY)

$(READY): pyproject.toml
	@echo 'installing into .venv, once: PyTorch is large, so this takes minutes, and pip says nothing meanwhile'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(READY)

train: $(READY)
	$(BIN)/python train.py $(ARGS)

# Hypothesis' plugin, which only reports on long tests, takes seconds after the last test.
test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal -p no:hypothesispytest -m '$(if $(TIER),$(TIER) and )not slow and not long' $(ARGS)

test-all: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile -m '' $(ARGS)  # the site, too, after make docs
	$(BIN)/python -m benchmarks.kill

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# the site, in site/index.html
docs: .venv/.ready-docs
	$(BIN)/mkdocs build --strict

.venv/.ready-docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch .venv/.ready-docs

clean:
	rm -rf .venv site *.egg-info .pytest_cache .ruff_cache .hypothesis
