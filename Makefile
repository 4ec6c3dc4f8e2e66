# Each target sets up all that it needs; nothing but Python >= 3.10 is expected.
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
comma := ,
# The oldest torch that works, one between, the newest: what `make torch-matrix` runs.
TORCHES ?= 2.9.1 2.11.0 2.14.1
# As many workers as cores, two at most; one thread each, as the workers already fill the cores.
PYTEST_CPU = TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 2

.DEFAULT_GOAL := help
.PHONY: help compare demo test test-full test-gpu torch-matrix mutants bench lint docs wheel clean
# Two installs into one environment must not run at once.
.NOTPARALLEL:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 16

compare: $(VENV)/.stamp-bench ## proxy-tokenized against full attention on this machine (ARGS="...")
	$(BIN)/ptattn compare $(ARGS)

test: $(VENV)/.stamp-test-t2x-demo ## the tests of every change, on the CPU (ARGS="...")
	$(PYTEST_CPU) -m "not long and not gpu" $(ARGS)

test-full: $(VENV)/.stamp-test-t2x-demo ## every CPU test, the long ones too
	HYPOTHESIS_PROFILE=full $(PYTEST_CPU) -m "not gpu" $(ARGS)

test-gpu: $(VENV)/.stamp-test ## the tests that need a CUDA GPU
	$(BIN)/python -m pytest -m gpu -rs -n logical --maxprocesses 8 $(ARGS)

torch-matrix: $(VENV)/.stamp-venv ## the tests of what torch decides, on several (TORCHES="...")
	$(BIN)/python -m tests.matrix $(TORCHES)

mutants: $(VENV)/.stamp-test ## whether the tests catch seeded faults in the kernels (ARGS="...")
	$(BIN)/python -m tests.mutants $(ARGS)

demo: $(VENV)/.stamp-demo ## PT-DiT and DiT learn digits for equal time; 15 minutes on 2 cores
	$(BIN)/python -m ptattn.train.demo $(ARGS)

bench: $(VENV)/.stamp-bench-t2x ## the benchmark suites (ARGS="...")
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

lint: $(VENV)/.stamp-lint-test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.stamp-docs ## the documentation as a site, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict -f docs/site/mkdocs.yml

wheel: $(VENV)/.stamp-venv ## build the wheel into dist/
	rm -rf build/lib build/bdist*  # setuptools would pack files deleted since the last build
	$(BIN)/python -m pip wheel -q --no-deps -w dist .
	@rm -rf build/lib build/bdist*; ls dist/*.whl

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip 21.3 is the first with editable installs by pyproject.toml; newer ones stay as they are.
$(VENV)/.stamp-venv:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: Python >= 3.10 is needed, but $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
	    "set PYTHON=..." >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q "pip>=21.3"
	@touch $@

# One stamp per set of extras: .stamp-bench-t2x installs .[bench,t2x].
$(VENV)/.stamp-%: setup.py constraints-cpu.txt | $(VENV)/.stamp-venv
	@if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then pins=; else pins="-c constraints-cpu.txt"; fi; \
	echo "installing ptattn[$(subst -,$(comma),$*)] $$pins"; \
	$(BIN)/python -m pip install -q $$pins -e ".[$(subst -,$(comma),$*)]"
	@touch $@
