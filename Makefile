# Two commands: `make run` trains and measures a small V3 on this machine, `make test` proves the
# code. Both set up what they need in .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet
TORCH := torch>=2.11,<2.14
# Where PyTorch keeps the builds without CUDA; pip goes on without it where it cannot be reached.
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# Compiled modules are kept, whatever the machine says: the suite starts a thousand processes, and each
# would compile the package anew, for a quarter of a second.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: run setup test test-gpu test-chaos test-clients test-trl test-setup lint mutations bench clean

run: setup
	$(BIN)/ziphius quickstart

setup: $(VENV)/.ready

test-setup: $(VENV)/.ready-test

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one with make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -m venv --clear $(VENV) || \
		{ echo "error: no virtual environment could be made; on Debian or Ubuntu: apt install python3-venv"; \
		  rm -rf $(VENV); exit 2; }
	@touch $@

$(VENV)/.torch: $(VENV)/.made
	@echo "installing torch (about 200 MB without CUDA)"
	@if command -v nvidia-smi >/dev/null 2>&1; then \
		$(PIP) "$(TORCH)"; \
	else \
		$(PIP) --retries 1 --timeout 20 --extra-index-url $(TORCH_CPU_INDEX) "$(TORCH)" || $(PIP) "$(TORCH)"; \
	fi
	@touch $@

$(VENV)/.ready: $(VENV)/.torch pyproject.toml
	@echo "installing ziphius"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	@echo "installing what the tests need"
	@$(PIP) --editable ".[test]"
	@touch $@

test: test-setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Faults of the server by the thousand: what 'make test' does in short.
test-chaos: test-setup
	$(BIN)/python -m pytest --chaos --timeout 1800 -s tests/serving

# On a machine with a GPU, by the python that is there: the tests of the kernels for GPUs, exact bits
# included. PYTHON names another.
test-gpu:
	$(PYTHON) -m pytest -m gpu tests/kernels/triton tests/gpu

# Clients that are not ours against the server, each in an environment of its own: 3 GB of packages
# below .cache/clients the first time. ONLY=openai runs one.
test-clients: test-setup
	$(BIN)/python -m tests.clients $(if $(ONLY),--only $(ONLY))

# Losses and advantages against trl, in an environment of its own: 1.5 GB below .cache/trl the first
# time. The ordinary tests compare with what it gave, tests/alignment/data/trl.json.
test-trl: test-setup
	$(BIN)/python -m tests.trl

lint: test-setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Applies known mistakes to a copy of the package, one at a time: the suite must notice each.
mutations: test-setup
	$(BIN)/python tests/mutations.py

# Every benchmark prints one JSON object as its last line.
bench: test-setup
	@for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info
