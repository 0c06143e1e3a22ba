# Every target installs what it needs; ./install.sh does nothing when it is all there.
SHELL := bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
PYTHON := .venv/bin/python

MODEL ?=
BUNDLE ?=
BENCH ?=
PROMPT ?= What is the capital of France?
TESTS ?= tests
FUZZ_CASES ?= 100000

.PHONY: help demo test test-all bench bench-quick fuzz chaos control test-bundle test-cluster check install lock clean

help: ## show this help
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

demo: export PROMPT := $(PROMPT)
demo: export MODEL := $(MODEL)
demo: ## install, load a model (MODEL=folder, GGUF file or hub id; default: SmolLM2), stream the answer to PROMPT="..."
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
	$(PYTHON) -m pytest -m "not slow" $(TESTS)

test-all: ## run those, too, that start a server or an engine for one more way to the same end
	@./install.sh --extra demo --extra test
	$(PYTHON) -m pytest $(TESTS)

bench: ## measure beside vLLM's own servers and AsyncLLM in process, three hours; into docs/benchmarks (BENCH="--fleet toy")
	@./install.sh --extra demo --extra test --extra bench
	$(PYTHON) -m tests.bench $(BENCH)

bench-quick: ## the same in five minutes: 1, 32 and 128 streams of a toy model; writes nothing
	@./install.sh --extra demo --extra test --extra bench
	$(PYTHON) -m tests.bench --quick --dry $(BENCH)

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

test-bundle: export BUNDLE := $(BUNDLE)
test-bundle: ## pack a bundle and run it where there is nothing else (root only; BUNDLE=folder: one that is packed)
	@./install.sh --extra demo --extra test
	bundle=$${BUNDLE:-dist/bundle}
	[ -n "$$BUNDLE" ] || ./package.sh "$$bundle"
	$(PYTHON) -m tests.models scripted smollm2
	BUNDLE=$$bundle unshare --mount --net --pid --fork --kill-child --mount-proc $(PYTHON) -m pytest -s tests/bundle

test-cluster: ## several machines in network namespaces: every topology, IPv6, names, Ray (root only)
	@./install.sh --extra demo --extra test
	CLUSTER=1 $(PYTHON) -m pytest -s tests/cluster

check: ## ruff, mypy --strict, shellcheck, and whether the stubs match
	@./install.sh --extra demo --extra test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	.venv/bin/shellcheck --external-sources --check-sourced install.sh package.sh run.sh packaging/lock.sh packaging/bundle-environment.sh .ci/run
	$(PYTHON) -m pytest -q tests/unit/test_stubs.py tests/unit/test_wire.py

install: ## install into .venv and generate the stubs
	@./install.sh

lock: ## make packaging/locks anew (UPGRADE=1: with the newest versions)
	@packaging/lock.sh

clean: ## remove what was installed and made
	rm -rf .venv .uv .models common/pb dist
