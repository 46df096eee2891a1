# Two commands for newcomers: `make demo` and `make test`. The rest is for those who change the code.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo cloud-demo test containers lock-containers lint types format bench snapshots parity lock clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.train ## Fine-tune the shipped model on photographs of a cat (2 cores: about 2 minutes)
	@# One thread: so small a model gains little from a second core, and loses much where that one is busy.
	OMP_NUM_THREADS=1 $(BIN)/sdtune train dreambooth-lora --backend local \
	  --base-model examples/base-model --dataset examples/datasets/images \
	  --instance-prompt "a photo of sks cat" --config examples/recipes/dreambooth-lora.yaml \
	  --output out/demo --overwrite

cloud-demo: $(VENV)/.dev ## The same as a job of Vertex AI, on servers of this machine: no GPU, no account
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.cloud_demo

test: $(VENV)/.dev ## Prove it: every test that needs no GPU
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev ## Style, unused code, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev ## Static types
	$(BIN)/mypy

format: $(VENV)/.dev ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

containers: $(VENV)/.dev ## Install each image's lock into a new environment and try it: minutes, and hundreds of megabytes
	$(BIN)/python -m pytest -m containers tests/containers

bench: $(VENV)/.dev ## Measure the command line and the dataset check; results go to benchmarks/RESULTS.md by hand
	$(BIN)/python benchmarks/cli_speed.py
	$(BIN)/python benchmarks/check_speed.py
	PYTHONPATH=. $(BIN)/python benchmarks/cloud_speed.py

snapshots: $(VENV)/.dev ## Renew the stored outputs that tests compare with
	$(BIN)/python -m pytest tests/snapshots --snapshot-update

parity: $(VENV)/parity/.ready ## Renew the losses of diffusers' example scripts: make parity DIFFUSERS=a git checkout of it
	@test -n "$(DIFFUSERS)" || { echo "wanted DIFFUSERS=folder, a git checkout of huggingface/diffusers" >&2; exit 2; }
	OMP_NUM_THREADS=1 $(VENV)/parity/bin/python tools/diffusers_parity.py "$(DIFFUSERS)"

lock-containers: ## Renew the images' locks from what they may be today
	$(PYTHON) tools/lock_containers.py

lock: ## Renew constraints.txt from what pyproject.toml allows today
	$(PYTHON) tools/lock.py

clean: ## Remove the environment and all results
	rm -rf $(VENV) out .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); \
	  sys.exit(None if ok else "sdtune needs Python 3.11 to 3.13 and found %d.%d; try: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable '.[train]'
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable '.[train,optimizers,wandb,dev]'
	@touch $@ $(VENV)/.train

# An environment of its own: with torchvision beside it, transformers reads pictures by other code.
$(VENV)/parity/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)/parity
	$(VENV)/parity/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[train]' datasets torchvision
	@touch $@
