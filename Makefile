# Two commands for newcomers: `make demo` and `make test`. The rest is for those who change the code.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Of `make test`: many tests wait for processes and servers, so one more than there are cores. 0: one after the other, in
# their order and in one process, where a debugger can stop them.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min((os.cpu_count() or 1) + 1, 8))')

.DEFAULT_GOAL := help
.PHONY: help demo cloud-demo test containers lock-containers notebooks browser api-options lint types format bench train-speed kills snapshots parity lock clean fuzz audit

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

test: $(VENV)/.dev ## Prove it: every test that needs no GPU; WORKERS=0 for one process, PYTEST_ARGS for some of them
	@# Who has nothing left to do takes half of another's rest, so files of slow tests are shared out, too.
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(PYTEST_ARGS)

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

fuzz: $(VENV)/.dev ## Look longer for what breaks the readers of files, settings and logs: FUZZ=20 is 20 times as long
	SDTUNE_FUZZ=$(or $(FUZZ),20) $(BIN)/python -m pytest --timeout 0 tests/security -k "fuzz or prompts or hostile"

audit: $(VENV)/audit/.ready ## Ask PyPI for known vulnerabilities of all that is locked; needs the network
	$(VENV)/audit/bin/pip-audit --strict --disable-pip --require-hashes --progress-spinner off \
	  $(addprefix --requirement ,$(wildcard containers/*/requirements.txt containers/*/sd-scripts.txt containers/*/workbench.txt containers/*/launcher.txt))
	$(VENV)/audit/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off --requirement constraints.txt

notebooks: $(VENV)/.dev ## Run the example notebooks and save what they show; SDTUNE_SD_SCRIPTS for that of kohya
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.notebooks

browser: $(VENV)/.dev $(VENV)/lab/.ready ## A notebook in JupyterLab and a headless Chromium (apt install chromium)
	$(BIN)/python -m pytest -m browser tests/browser

api-options: $(VENV)/.dev ## Renew the options that editors see of sdtune.train and its neighbours
	$(BIN)/python tools/api_options.py

bench: $(VENV)/.dev ## Measure the command line and the dataset check; results go to benchmarks/RESULTS.md by hand
	$(BIN)/python benchmarks/cli_speed.py
	$(BIN)/python benchmarks/check_speed.py
	PYTHONPATH=. $(BIN)/python benchmarks/cloud_speed.py

train-speed: $(VENV)/parity/.ready ## Prove benchmarks/train_speed.py on small models: make train-speed DIFFUSERS=a git checkout of it
	@test -n "$(DIFFUSERS)" || { echo "wanted DIFFUSERS=folder, a git checkout of huggingface/diffusers" >&2; exit 2; }
	OMP_NUM_THREADS=1 $(VENV)/parity/bin/python benchmarks/train_speed.py --tiny --diffusers-examples "$(DIFFUSERS)/examples"

kills: $(VENV)/.dev ## Kill training runs 200 times at random moments: all must end with the same files (20 minutes)
	PYTHONPATH=. $(BIN)/python -m tests.survival.kills --kills 200

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

$(VENV)/audit/.ready: Makefile
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet 'pip-audit>=2.9'
	@touch $@

# An environment of its own, as JupyterLab's mostly is: kernels run in another.
$(VENV)/lab/.ready:
	$(PYTHON) -m venv $(VENV)/lab
	$(VENV)/lab/bin/python -m pip install --quiet 'jupyterlab>=4.4,<5' 'playwright>=1.50,<2'
	@touch $@

# An environment of its own: with torchvision beside it, transformers reads pictures by other code.
$(VENV)/parity/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)/parity
	$(VENV)/parity/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[train]' datasets torchvision
	@touch $@
