# `make demo` checks a claim; `make test` runs the tests. Each makes .venv and installs what it needs first.
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# One thread a process: the processes use the cores, and idle threads must not spin on them.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
ifneq ($(wildcard ../shared/data),)
export PAPERWORKS_DATA ?= $(abspath ../shared/data)
endif

.PHONY: demo test
demo: .venv/installed
	$(BIN)/paperworks check logitclip

test: .venv/developing
	$(BIN)/python -m pytest -n 2

.venv/installed: pyproject.toml constraints.txt
	$$(command -v python3.11 || command -v python3) -m venv .venv
	$(PIP) --upgrade pip
	@echo "installing paperworks: PyTorch with its GPU libraries takes some minutes"
	$(PIP) --editable .
	@touch $@

.venv/developing: .venv/installed
	@echo "installing what tests and docs need"
	$(PIP) --editable '.[all]' --group dev --group docs
	@touch $@
