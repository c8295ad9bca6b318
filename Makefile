# Everything starts here: `make` lists what there is. PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
PYTEST_ARGS ?=
# Two processes; a file stays in one, because its tests share what they set up.
PYTEST_WORKERS ?= -n 2 --dist loadfile

VENV := .venv
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
STAMP := $(VENV)/installed-for-python$(VERSION)
SHELL_SCRIPTS := $(shell git ls-files '*.sh' '*.sbatch' .ci/run 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r name text; \
	  do printf '  make %-8s %s\n' "$$name" "$$text"; done

setup: $(STAMP)  ## make .venv with everything, at the versions of constraints.txt

# Another interpreter, or an installation that was interrupted, starts from an empty environment; a changed
# pyproject.toml or constraints.txt only installs what differs.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing or older than Python 3.11; name another one: make setup PYTHON=python3.12" >&2; exit 1; }
	@[ -e $@ ] || { echo "setup: $(VENV) with Python $(VERSION)"; rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	@echo "setup: installing the packages of constraints.txt (some minutes, once)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	@touch $@
	@echo "setup: done; activate it with: . $(BIN)/activate"

demo: setup  ## pretrain, resume, fine-tune and export a small ALBERT on this machine, with a report
	@$(BIN)/python -m launcher demo

test: setup  ## run the tests; PYTEST_ARGS="-k NAME -x" passes options on
	@$(BIN)/python -m pytest $(PYTEST_WORKERS) $(PYTEST_ARGS)

lint: setup  ## check style, types, import rules and shell scripts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@if ! command -v shellcheck >/dev/null; then echo "shellcheck is not installed: shell scripts not checked"; \
	  else shellcheck $(SHELL_SCRIPTS) && echo "shellcheck: $(words $(SHELL_SCRIPTS)) scripts"; fi

bench: setup  ## measure; one JSON line per figure
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@$(BIN)/python -m benchmarks

clean:  ## remove .venv and caches
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
