# Each command makes .venv with what it needs, and then runs. On a machine without an NVIDIA GPU torch is the CPU build.
PYTHON ?= python3
TORCH_VERSION = 2.13.0
SYSTEM := $(shell uname -s)
GPU := $(shell command -v nvidia-smi)
ifeq ($(or $(GPU),$(filter Darwin,$(SYSTEM))),)
TORCH ?= torch==$(TORCH_VERSION)+cpu --extra-index-url https://download.pytorch.org/whl/cpu
else
TORCH ?= torch==$(TORCH_VERSION)
endif
PIP = .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off --quiet -c constraints.txt

help:  ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/'

demo: .venv/run  ## read a CT and a DICOM folder, answer questions, draw what was kept (writes demo/)
	.venv/bin/python scripts/demo.py

test: .venv/dev  ## run all tests (no network, no GPU, some minutes)
	.venv/bin/python -m pytest -q -n auto

lint: .venv/dev  ## check style
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:  ## remove .venv and what the demo wrote
	rm -rf .venv demo

.venv/torch:
	$(PYTHON) -m venv .venv
	@echo "installing $(TORCH)"
	@.venv/bin/python -m pip install --disable-pip-version-check -qq --retries 1 --timeout 10 $(TORCH)
	@touch $@

.venv/run: .venv/torch requirements.txt constraints.txt
	$(PIP) -r requirements.txt
	@touch $@

.venv/dev: .venv/run requirements-train.txt requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

.PHONY: help demo test lint clean
