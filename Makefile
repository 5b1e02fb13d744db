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
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/'

demo: .venv/run  ## read a CT and a DICOM folder, answer questions, draw what was kept (writes demo/)
	.venv/bin/python scripts/demo.py

app: .venv/app photon/app/node_modules  ## a page on which to ask about a scan, at http://localhost:7860
	.venv/bin/python -m photon.app

serve: .venv/app  ## a server with the OpenAI API, at http://localhost:8000
	.venv/bin/python -m photon.serving

test: .venv/dev  ## run all tests (no network, no GPU, some minutes)
	.venv/bin/python -m pytest -q -n auto

test-app: .venv/app-dev photon/app/node_modules  ## test the page in a browser, and the server (Chromium from apt)
	@command -v chromium chromium-browser >/dev/null || \
	(apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null) || \
	echo "Chromium is not here and could not be installed, so the tests in a browser are skipped"
	.venv/bin/python -m pytest -q tests/app

docs: .venv/docs  ## the documentation as a site, in build/site; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

real-size: .venv/dev  ## a random 3B model: converted, asked, one LoRA step; memory and seconds (16 GB of disk, minutes)
	.venv/bin/python benchmarks/real_size.py --preset 3b --json benchmarks/results/real_size_3b.json

evidence: .venv/dev  ## what answers alone teach a scheduler to keep: trainings, tables, plot (hours; goes on where it was)
	.venv/bin/python -m photon.evidence --output evidence
	.venv/bin/python benchmarks/surrogate.py --model evidence/start0 evidence/exact-0/checkpoint-* \
	--data evidence/test/test.jsonl --json benchmarks/results/surrogate.json
	.venv/bin/python benchmarks/draws.py --model evidence/start0 evidence/exact-0/final . \
	--data evidence/test/test.jsonl --json benchmarks/results/draws.json
	.venv/bin/python -m photon.evidence --output evidence --report
	.venv/bin/python -m photon.evidence --output evidence --preset nine --seeds 0 --report

peers: .venv/dev  ## every selection method on the same questions: DENSE=, TRAINED=, DATA= (half an hour; goes on)
	.venv/bin/python benchmarks/peers.py --preset full --dense $(or $(DENSE),.) --trained $(or $(TRAINED),.) \
	$(and $(DATA),--data $(DATA)) --json benchmarks/results/peers.json --page docs/peers.md --plot docs/peers.png

lint: .venv/dev  ## check style
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:  ## remove .venv and what the demo wrote
	rm -rf .venv demo build photon/app/node_modules

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

.venv/app: .venv/run requirements-app.txt requirements-serve.txt
	$(PIP) -r requirements-app.txt -r requirements-serve.txt
	@touch $@

.venv/docs: .venv/torch requirements-docs.txt
	$(PIP) -r requirements-docs.txt
	@touch $@

.venv/app-dev: .venv/app .venv/dev .venv/docs
	$(PIP) openai playwright "ray[serve]"
	@touch $@

photon/app/node_modules: photon/app/package-lock.json
	@if command -v npm >/dev/null; then npm ci --prefix photon/app --ignore-scripts --omit=optional --silent; \
	else echo "npm is not here, so the page has no 3D view"; fi

.PHONY: evidence peers real-size help demo app serve test test-app docs lint clean
