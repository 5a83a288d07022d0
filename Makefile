# The first target that needs it makes .venv; nothing else has to be installed but python3 (3.11 or newer) and its venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := torch==2.13.0
EXTRAS := dev,mnist,faces,lite0,minilm,serve,flower
OUT    ?= runs/quickstart
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: setup format check test slow quickstart docs recipes lock clean help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv with the locked versions and personae, editable

# torch comes first and by itself, so that pip takes the build that suits the machine; one that is there already stays.
$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is missing or older than 3.11; name another one: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) \
		|| { echo "could not make $(VENV); on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(BIN)/python -c 'import sys; from importlib.metadata import version as v; \
		sys.exit(tuple(map(int, v("torch").split(".")[:2])) < (2, 6))' 2>/dev/null \
		|| $(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -c requirements.lock -e ".[$(EXTRAS)]"
	@touch $@

format: $(READY) ## Rewrite the code as ruff formats it, and fix what ruff can fix
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

check: $(READY) ## Lint, format and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processors or twenty, a test computes the same bits.
test slow recipes: export OMP_NUM_THREADS = 1

# A worker of tests for every processor.
test: $(READY) ## The fast tests: no network, no GPU, a quarter of an hour of one processor
	$(BIN)/pytest -q -n auto --dist worksteal

slow: $(READY) ## The slow tests: whole runs, stopped and resumed
	$(BIN)/pytest -q -n auto --dist worksteal -m slow

quickstart: $(READY) ## A first result in minutes, in runs/quickstart or the next free runs/quickstart-N (or OUT=folder)
	@out="$(OUT)"; n=1; while [ -e "$$out" ]; do n=$$((n + 1)); out="$(OUT)-$$n"; done; \
	set -x; $(BIN)/personae run quickstart --out "$$out"

docs: $(READY) ## Write docs/cli.md from the --help texts
	$(BIN)/typer personae.cli.app utils docs --name personae --output docs/cli.md

recipes: $(READY) ## Run every recipe for two rounds on little data
	$(BIN)/pytest -q -m "not gpu" tests/recipes

# The lock holds neither torch (TORCH above says which) nor what a CUDA build of it brings, so that it serves every machine.
lock: ## Write requirements.lock anew, with the newest versions that go together
	rm -rf .lock-venv
	$(PYTHON) -m venv .lock-venv
	.lock-venv/bin/pip install --quiet $(TORCH)
	.lock-venv/bin/pip install --quiet -e ".[$(EXTRAS)]"
	{ echo "# Written by \`make lock\`: constraints for pip, without torch and what its CUDA builds bring."; \
	.lock-venv/bin/pip freeze --exclude-editable --exclude pip --exclude setuptools \
		| grep -viE '^(torch[ =]|triton|nvidia-|cuda-)' ; } > requirements.lock.new
	rm -rf .lock-venv
	mv requirements.lock.new requirements.lock

clean: ## Remove .venv, caches and built packages; runs stay
	rm -rf $(VENV) .lock-venv build dist .pytest_cache .mypy_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
