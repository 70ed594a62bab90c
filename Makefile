# Two commands for a fresh machine. Each makes its own virtual environment in .venv; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA GPU, PyTorch's index of CPU builds goes first: the default build for Linux brings gigabytes of CUDA.
# A CPU build's version ends in +cpu, which pip prefers to the same version without.
CPU_INDEX := $(if $(shell command -v nvidia-smi 2>/dev/null),,--extra-index-url https://download.pytorch.org/whl/cpu)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint clean

demo: $(VENV)/tasks  ## condense scikit-learn's handwritten digits into ten images
	rm -rf runs/demo
	$(BIN)/bilevel run condensation --preset digits --out runs/demo

test: $(VENV)/dev lint  ## lint, types, tests, and the commands that README.md shows
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt $(CPU_INDEX) torch
	$(PIP) --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) runs
