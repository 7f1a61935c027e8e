# `make demo` and `make test` need Python 3.11 or later, pip and make; everything else they install into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint setup clean

demo: setup
	$(BIN)/raycap sweep shapes-git

test: setup
	$(BIN)/python -m pytest -q

lint: setup
	$(BIN)/ruff check raycap jobs tests tools benchmarks
	$(BIN)/ruff format --check raycap jobs tests tools benchmarks

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
