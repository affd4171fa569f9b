# "make test" and "make demo" need nothing before them: both set up .venv first.
# PYTHON=python3.12 make test   picks a Python; launch/README.md names the other settings.

VENV := $(CURDIR)/.venv
TEST_ARGS ?=

# A Python that was asked for is taken or refused. Otherwise that of .venv or the first that fits is.
ifeq ($(origin PYTHON),undefined)
  PYTHONS = "$(VENV)/bin/python" python3 python3.13 python3.12 python3.11
else
  PYTHONS = "$(PYTHON)"
endif
FITS = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

# As an activated environment, whatever other one is active. OMP_NUM_THREADS and the like are left to
# the programs. mpirun refuses to run as root unless told twice.
IN_VENV = env -u PYTHONHOME -u PYTHONPATH VIRTUAL_ENV="$(VENV)" PATH="$(VENV)/bin:$$PATH"
ifeq ($(shell id -u),0)
  IN_VENV += OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
endif

.DEFAULT_GOAL := help
.PHONY: help setup test test-long test-slurm soak demo lint format clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv: pinned packages, Horovod, the project (once; then it starts at once)
	@for python in $(PYTHONS); do \
	    if "$$python" -c "$(FITS)" >/dev/null 2>&1; then \
	        exec env -u PYTHONHOME -u PYTHONPATH "$$python" -u -m launch.setup_env; \
	    fi; \
	done; \
	{ echo "set-up stopped: no Python 3.11 to 3.13 that runs:" $(PYTHONS); \
	echo "           fix: PYTHON=/path/to/python3.12 make setup   (or install one)"; exit 1; } >&2

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
	$(RANKS) -m "long and ranks and not slurm" || failed=1; \
	exit $$failed

test-slurm: setup ## jobs on a real Slurm, those that wait for minutes too (root; apt-get install slurm-wlm munge libpmix-dev)
	@$(PYTEST) -m slurm tests/slurm

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
