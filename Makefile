# The developer's manual: each command makes .venv or brings it up to date, then does what it says.
#
#   make demo    adapt a real encoder to a real task and print the table      (the first thing to try)
#   make test    the test suite, with line coverage of the core floors
#   make lint    style, floors, types
#   make bench   every benchmark, then bench/RESULTS.md
#   make recipes each recipe from end to end on small real data, then docs/recipes.md
#   make docs    the documentation, in site/
#   make clean   remove the environment and everything that commands wrote
#
# Another interpreter:          make demo PYTHON=python3.12
# Arguments of your own:        make test ARGS="tests/test_config.py -x", make bench ARGS="--rounds 3"
# A machine without a GPU can spare itself the CUDA wheels:
#                               make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 3
ARGS ?=
PIP_ARGS ?=

BIN := $(VENV)/bin
# What takes long is left out: compare_methods.py, paper_tables.py, peft_suite.py and pretrain_tiny_gpt2.py are started by hand, and go on where they stopped.
BENCHES := $(filter-out $(addprefix bench/,compare_methods.py peft_suite.py harness.py models.py orderings.py paper_studies.py paper_tables.py paper_writing.py plain_text.py pretrain_tiny_gpt2.py report.py serve_soak.py small_decoder.py weight_directions.py),$(sort $(wildcard bench/*.py)))
FLOORS := config errors functional kernels inits state tree find check adapter layers pieces algebra checkpoint model
comma := ,
empty :=
CORE := $(subst $(empty) ,$(comma),$(foreach floor,$(FLOORS),src/lorica/$(floor).py src/lorica/$(floor)/*))

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench recipes docs clean

help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/demo.stamp
	$(BIN)/lorica demo $(ARGS)

# Bytecode is kept: the suite starts many processes, and each would compile lorica again. Three workers keep two cores
# busy: some tests wait, and Ray brings processes of its own.
test: $(VENV)/dev.stamp
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n $(JOBS) --dist worksteal --cov --cov-report= $(ARGS)
	@test -n "$(ARGS)" || $(BIN)/coverage report --include='$(CORE)' --fail-under=95

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/pyright

bench: $(VENV)/dev.stamp
	@set -e; for script in $(BENCHES); do echo "== $$script"; $(BIN)/python $$script $(ARGS); done
	$(BIN)/python bench/report.py

recipes: $(VENV)/dev.stamp
	$(BIN)/python recipes/small/run.py $(ARGS)

docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) build dist site runs htmlcov .coverage .coverage.* .hypothesis .pytest_cache .ruff_cache .import_linter_cache
	find src tests bench -name __pycache__ -prune -exec rm -rf {} +

# The demo's environment is the smaller one; the developer's is the same one with more in it, so the second command
# downloads only what the first did not need.
INSTALL = $(BIN)/pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"lorica needs Python 3.11 or later; {sys.executable} is {sys.version.split()[0]}. Name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (the first time takes a few minutes) ..."
	@$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	@echo "installing the developer's tools into $(VENV) ..."
	@$(INSTALL) -e '.[dev]'
	@touch $@
