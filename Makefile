# Everything starts from `python3` (3.11 or newer) and a package index.
#   make demo        environment, then the fine-tuning example
#   make test        environment, lint, types, wheel, fast tests
#   make test-all    the same with the slow tests
#   make test-oldest, make test-newest
#                    the fast tests with the oldest torch promised, with the newest released
#   make fuzz MINUTES=60
#                    random programs, sequences and loops, with new seeds
#   make kernels     every generated kernel compiled for each GPU architecture, and inspected
#   make asan        the tests of compiled CPU code under AddressSanitizer (GCC)
#   make docs        the documentation, in build/site

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP ?= $(BIN)/python -m pip --disable-pip-version-check
INSTALL := .ci/install
# One worker a core: most of a test's time is compiling, which one thread does.
PYTEST ?= $(BIN)/pytest -n logical --maxprocesses 8

STAMP := $(VENV)/.installed
WHEEL := build/wheel
PACKAGE := falqon_fx/py.typed $(shell find falqon_fx passes kernels -name '*.py' -o -name '*.jinja' -o -name '*.cpp')

.PHONY: venv demo test test-fast test-all test-oldest test-newest fuzz kernels asan docs check lint types format wheel-check clean

venv: $(STAMP)

$(STAMP): pyproject.toml requirements-nodeps.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install uv
	UV_COMPILE_BYTECODE=1 $(INSTALL) $(BIN)/python --editable '.[peft,examples,dev]'
	$(INSTALL) $(BIN)/python --no-deps --requirement requirements-nodeps.txt
	touch $@

demo: venv
	$(BIN)/python examples/finetune.py

# Installing the wheel waits for the network, types for a core. The tests come last, so that their
# closing line is the last one.
test: venv
	$(MAKE) --jobs=3 --output-sync check
	$(MAKE) test-fast

test-fast: venv
	$(PYTEST) -m "not slow"

test-all: check
	HYPOTHESIS_PROFILE=all $(PYTEST) -m ""

# With another torch, in an environment beside the usual one. It is installed from the usual index,
# where torch may be a CUDA build: 6 GB on disk.
test-oldest test-newest: test-%: build/%/.installed
	build/$*/bin/python -m pip list | grep -E '^(torch|triton) '
	$(PYTEST:$(BIN)/%=build/$*/bin/%) -m "not slow"

build/oldest/.installed: $(STAMP)
	$(PYTHON) -m venv build/oldest
	UV_COMPILE_BYTECODE=1 $(INSTALL) build/oldest/bin/python --editable '.[peft,examples,dev]' 'torch==2.11.*' 'triton==3.6.*'
	$(INSTALL) build/oldest/bin/python --no-deps --requirement requirements-nodeps.txt
	touch $@

# torch is upgraded last: `dev` bounds triton for the CPU build of one torch, and a newer torch needs
# a newer triton.
build/newest/.installed: $(STAMP)
	$(PYTHON) -m venv build/newest
	UV_COMPILE_BYTECODE=1 $(INSTALL) build/newest/bin/python --editable '.[peft,examples,dev]'
	$(INSTALL) build/newest/bin/python --no-deps --requirement requirements-nodeps.txt
	UV_COMPILE_BYTECODE=1 $(INSTALL) build/newest/bin/python --upgrade torch
	touch $@

# New seeds each time; ends with how many examples there were and that none was different.
MINUTES ?= 60
fuzz: venv
	$(BIN)/python tests/fuzz.py --minutes $(MINUTES)

kernels: venv
	$(BIN)/python -m falqon_fx.kernels.matrix

# The compiler is a script that adds the flags. Python itself has leaks at its end.
ASAN := $(CURDIR)/build/asan
ASAN_TESTS := $(addprefix tests/,kernels/test_cpu.py kernels/test_cpu_operands.py \
	kernels/test_cpu_experts.py test_lowering.py \
	test_lowering_cpu.py attack/test_crafted.py attack/test_crafted_manifests.py)

asan: venv
	mkdir -p $(ASAN)/bin
	printf '#!/bin/sh\nexec g++ -fsanitize=address -fno-omit-frame-pointer -g "$$@"\n' > $(ASAN)/bin/g++
	chmod +x $(ASAN)/bin/g++
	CXX=$(ASAN)/bin/g++ FALQON_CACHE=$(ASAN)/falqon \
		ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		$(BIN)/pytest -n 0 $(ASAN_TESTS)
	grep --recursive --quiet __asan_report_store $(ASAN)/falqon # it was on

docs: venv
	$(BIN)/python docs/options.py --write
	$(BIN)/mkdocs build --strict

check: lint types wheel-check

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: venv
	$(BIN)/mypy

# Source archive, wheel from it, both as a package index would check them, and a new environment that holds nothing but the wheel and what it
# requires. The imports run in another folder and isolated (-I), so they cannot find the sources.
wheel-check: venv
	rm -rf $(WHEEL)
	$(BIN)/python -m build --outdir $(WHEEL) .
	$(BIN)/python -m twine check --strict $(WHEEL)/*
	$(BIN)/python -m zipfile --list $(WHEEL)/*.whl > $(WHEEL)/files.txt
	for file in $(patsubst falqon_fx/cli/%,falqon_fx_cli/%,$(patsubst passes/%,falqon_fx/passes/%,$(patsubst kernels/%,falqon_fx/kernels/%,$(PACKAGE)))); do \
		grep -q "^$$file " $(WHEEL)/files.txt || { echo "$$file is not in the wheel"; exit 1; }; \
	done
	grep jinja $(WHEEL)/files.txt
	$(PYTHON) -m venv $(WHEEL)/env
	$(INSTALL) $(WHEEL)/env/bin/python --quiet $(WHEEL)/*.whl
	cd $(WHEEL)/env && bin/python -I -W ignore -c 'import torch; \
		assert "falqon" in torch._dynamo.list_backends(); \
		import falqon_fx, falqon_fx.passes, falqon_fx.kernels; \
		[print(m.__name__, m.__file__) for m in (falqon_fx, falqon_fx.passes, falqon_fx.kernels)]; \
		torch._dynamo.lookup_backend("falqon")'
	cd $(WHEEL)/env && bin/falqon-fx --version && bin/falqon-fx explain --help > help.txt
	rm -rf $(WHEEL)/env

clean:
	rm -rf $(VENV) build dist out *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
