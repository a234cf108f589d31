.DEFAULT_GOAL := help
.PHONY: help train test check soak bench pages clean
SHELL := /bin/bash
BIN := .venv/bin

help:  ## list the targets
	@grep -E '^[a-z_-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z_-]+):.*## /  make \1\t/' | expand -t 18

train: .venv/train  ## set up once, then train: on the pictures that ship, or as ARGS="data=folder data.root=DIR" says
	$(BIN)/python -m trainer $(ARGS)

test: .venv/dev  ## set up once, then run the tests
	$(BIN)/python -m pytest $(ARGS)

check: .venv/dev  ## lint, format and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

soak: .venv/dev  ## kill real runs 200 times and compare each with an undisturbed one (KILLS=n SEED=n)
	$(BIN)/python -m tests.soak --kills $(or $(KILLS),200) --seed $(or $(SEED),0)

bench: .venv/bench  ## measure against peers in one run, and write docs/benchmarks.md (ARGS="input loop start stall")
	$(BIN)/python -m tests.benchmarks $(ARGS)

pages: .venv/dev  ## install Chromium (apt-get) and open the pages in it
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium; }
	$(BIN)/python -m pytest -m chromium

clean:  ## remove the virtual environment and caches; runs and data stay
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache

# What is installed depends on these files alone, so a second make sets nothing up.
.venv/%: pyproject.toml constraints.txt .ci/setup
	.ci/setup $*
