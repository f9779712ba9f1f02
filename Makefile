# `make demo` and `make test` need python3 (3.11 or newer, with venv) and make; they create .venv, install into it, and
# run. A second call reuses .venv until settings.ini or setup.py changes.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

test test-all notebooks: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all notebooks clean export readme surface docs hooks

help: ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): settings.ini setup.py
	@command -v $(PYTHON) >/dev/null || { echo 'interp_parts needs Python 3.11 or newer, and there is no $(PYTHON): install it, or name another with "make PYTHON=python3.12"'; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3,11) or sys.exit(f"interp_parts needs Python 3.11 or newer, and $(PYTHON) is {v[0]}.{v[1]}: name another with \"make PYTHON=python3.12\"")'
	@echo 'Installing into .venv (once; some minutes, and 7 GB where torch brings CUDA)'
	@if command -v uv >/dev/null; then uv venv --quiet --allow-existing --python $(PYTHON) .venv && uv pip install --quiet --python $(BIN)/python -e '.[dev]'; \
	else $(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo '$(PYTHON) has no venv: install it (Debian, Ubuntu: apt install python3-venv)'; exit 1; }; \
	     $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'; fi
	@touch $@

install: $(STAMP) ## create .venv and install the library with its tools

demo: $(STAMP) ## train, evaluate and show part discovery on synthetic birds: demo-run/report.html
	$(BIN)/interp-parts demo --out demo-run

test: $(STAMP) ## every check and every notebook, without slow cells (12 minutes at most on 2 cores)
	$(BIN)/python tools/test.py --workers $(WORKERS)

test-all: $(STAMP) ## the same with slow cells
	$(BIN)/python tools/test.py --workers $(WORKERS) --flags slow

notebooks: $(STAMP) ## run all notebooks again and save their outputs
	$(BIN)/python tools/notebooks.py

clean: $(STAMP) ## strip notebooks of what changes with every run
	$(BIN)/nbdev_clean

export: $(STAMP) ## write interp_parts/ from the notebooks
	$(BIN)/nbdev_export

readme: $(STAMP) ## write README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

surface: $(STAMP) ## write tests/surface.txt, the public names with their default values
	$(BIN)/python tools/surface.py

docs: $(STAMP) ## write the documentation site to _docs (needs Quarto)
	$(BIN)/python tools/pages.py --render

hooks: $(STAMP) ## install Jupyter and git hooks that keep notebooks clean
	$(BIN)/nbdev_install_hooks
