# SonoEdge from a fresh clone: `make demo` shows it, `make test` checks it. Both install what they need into .venv/ first.
PYTHON ?= python3
BUNDLE ?= demo_out/bundle
VENV := .venv
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test lint format bench demo-checkpoint clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

install: $(INSTALLED) ## create .venv with the pinned versions

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) here; on Debian or Ubuntu: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: SonoEdge needs Python 3.10 or newer and $(PYTHON) is older; name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot create environments; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[cpu,viewer,export,rtx,dev]'
	@touch $@

demo: install ## the whole pipeline on the packaged checkpoint and a real clip; leaves demo_out/
	$(VENV)/bin/sonoedge demo

test: lint ## the linters, then the whole test suite, two files at a time
	$(VENV)/bin/pytest --numprocesses=2 --dist=loadfile

lint: install ## style, types and the direction of imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: install ## rewrite the code in the project's style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: install ## latency by stage of the bundle that the demo leaves (BUNDLE=… for another)
	$(VENV)/bin/sonoedge bench $(BUNDLE)

demo-checkpoint: install ## train the packaged checkpoint again
	$(VENV)/bin/python -m sonoedge.export.train_demo

clean: ## remove what make created
	rm -rf $(VENV) demo_out build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
