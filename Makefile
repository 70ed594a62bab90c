# Two commands for a fresh machine. Each makes its own virtual environment in .venv; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA GPU, PyTorch's own index is asked for torch, and for nothing else: the default build for Linux brings
# gigabytes of CUDA. Where that index does not answer at once, torch comes from the ordinary index like everything else.
CPU_INDEX := https://download.pytorch.org/whl/cpu
HAS_GPU := $(shell command -v nvidia-smi 2>/dev/null)
# Errors are shown; warnings, such as those of indexes that do not have a package, are not.
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check

.PHONY: demo test test-all lint style types fast-tests docs docs-serve clean

demo: $(VENV)/tasks  ## condense scikit-learn's handwritten digits into ten images
	rm -rf runs/demo
	$(BIN)/bilevel run condensation --preset digits --out runs/demo

test: $(VENV)/dev style  ## lint, types, and the fast tests
	$(MAKE) --jobs 2 types fast-tests  # side by side, since types keep one core busy and the tests two

fast-tests: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 -m 'not slow'

test-all: $(VENV)/dev  ## all tests, the slow ones too: statistics over many draws, the page of losses, killed runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

lint: style types

style: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/docs  ## build the documentation into site/; a warning or a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/docs  ## show the documentation at http://127.0.0.1:8000 while it is written
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

$(VENV)/%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(HAS_GPU),)
	@$(PIP) --constraint constraints.txt --index-url $(CPU_INDEX) --retries 0 --timeout 10 --no-deps torch 2>/dev/null || \
		echo "$(CPU_INDEX) does not answer: torch comes from the ordinary index"
endif
	$(PIP) --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) runs site
