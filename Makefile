# `make demo` and `make test` do all of their own set-up in .venv; `make lint` wants one more install.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/ready
	$(BIN)/baft-easyedit demo

test: $(VENV)/ready
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/pip install -q -c constraints.txt -e '.[lint]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# torch comes first and by its exact version, so that nothing else chooses another build of it.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[easyedit,test]'
	$(BIN)/pip install -q -c constraints.txt --no-deps easyeditor
	touch $@

clean:
	rm -rf $(VENV)
