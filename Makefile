# "make test" and "make demo" need nothing before them: both set up .venv first.
# PYTHON=python3.12 make test   picks a Python; launch/setup_env.py --help names the other settings.

VENV := $(CURDIR)/.venv
TEST_ARGS ?=

# A Python that was asked for is asked for; otherwise set-up takes what it finds.
ifeq ($(origin PYTHON),undefined)
  FIND_PYTHON := python3
  SETUP = python3 launch/setup_env.py
else
  FIND_PYTHON := $(PYTHON)
  SETUP = "$(PYTHON)" launch/setup_env.py --python "$(PYTHON)"
endif

# As an activated environment, whatever other one is active. OMP_NUM_THREADS and the like are left to
# the programs. mpirun refuses to run as root unless told twice.
IN_VENV = env -u PYTHONHOME -u PYTHONPATH VIRTUAL_ENV="$(VENV)" PATH="$(VENV)/bin:$$PATH"
ifeq ($(shell id -u),0)
  IN_VENV += OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
endif

.DEFAULT_GOAL := help
.PHONY: help setup test test-long soak demo lint format clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv: pinned packages, Horovod, the project (once; then it starts at once)
	@command -v "$(FIND_PYTHON)" >/dev/null || { echo "set-up stopped: $(FIND_PYTHON) is not there"; \
	    echo "          mend: PYTHON=/path/to/python3.11 make setup   (3.11 to 3.13)"; exit 1; } >&2
	@$(SETUP)

PYTEST = $(IN_VENV) "$(VENV)/bin/python" -m pytest
# Two at a time; what starts ranks needs both cores for itself.
COMPUTES = $(PYTEST) -n 2 --dist loadfile
RANKS = $(PYTEST) --ignore tests/unit

test: setup ## the tests (TEST_ARGS="-k word" for some)
ifeq ($(strip $(TEST_ARGS)),)
	@failed=0; \
	$(COMPUTES) -m "not (ranks or long or soak)" || failed=1; \
	$(RANKS) -m "ranks and not (long or soak)" || failed=1; \
	exit $$failed
else
	@$(PYTEST) $(TEST_ARGS)
endif

test-long: setup ## statistics, and repetitions that make test leaves out
	@failed=0; \
	$(COMPUTES) -m "long and not ranks" || failed=1; \
	$(RANKS) -m "long and ranks" || failed=1; \
	exit $$failed

soak: setup ## 10,000 steps of three ranks through random faults
	@$(PYTEST) -m soak
	@$(IN_VENV) "$(VENV)/bin/python" -m tests.soak.soak

demo: setup ## the main job: Horovod's optimizer against the Anderson one, on real images
	@$(IN_VENV) "$(VENV)/bin/python" -m models.demo

lint: setup ## ruff and mypy
	@$(IN_VENV) ruff check .
	@$(IN_VENV) ruff format --check .
	@$(IN_VENV) mypy

format: setup ## ruff's formatting and safe fixes
	@$(IN_VENV) ruff check --fix .
	@$(IN_VENV) ruff format .

clean: ## remove .venv and what set-up, tests and builds left (not the cache of built wheels)
	rm -rf .venv .setup build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
