# Plain `make` lists the targets. Everything is installed into .venv; nothing outside this folder is changed.

# Without PYTHON an existing .venv is kept, whichever interpreter made it.
PYTHON ?= $(if $(wildcard .venv/installed-*),.venv/bin/python,python3)
WORKERS ?= 2

# The minor version of $(PYTHON), empty where it cannot run this package.
minor := $(shell $(PYTHON) -c 'import sys; v = sys.version_info; print(v[1] if (3, 11) <= v < (4,) else "")' 2>/dev/null)
pins := $(firstword $(wildcard constraints/python3.$(minor).txt) constraints/python3.12.txt)
installed := .venv/installed-3.$(minor)
pip = -m pip -qq --disable-pip-version-check
pytest = .venv/bin/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help interpreter install quickstart study test test-slow test-scale test-gpu extras constraints clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo 'PYTHON=python3.12 chooses the interpreter (3.11 or newer), WORKERS=4 the number of test processes.'

interpreter:
	@test -n '$(minor)' || { echo "'$(PYTHON)' is not Python 3.11 or newer; name one: make install PYTHON=python3.12" >&2; exit 1; }

install: $(installed)  ## make .venv with the pinned dependencies, the test tools and this package
	@echo 'Installed in .venv (Python 3.$(minor), $(pins)).'

$(installed): setup.cfg pyproject.toml $(wildcard constraints/*.txt) | interpreter
	@.venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info[1] != $(minor))' 2>/dev/null \
	  || $(PYTHON) -m venv --clear .venv
	@echo 'Installing into .venv (about 1.1 GB on disk).'
	@.venv/bin/python $(pip) install -c $(pins) setuptools
	@.venv/bin/python $(pip) install -c $(pins) --no-build-isolation -e '.[test]'
	@touch $@

quickstart: install  ## train a small hybrid on the CPU and show what it learned
	@.venv/bin/python run.py

study: install  ## train, score and draw the small study (docs/study.md); the same again goes on where it was
	@.venv/bin/python tools/study.py

test: install  ## check the style, then run every test that needs no accelerator
	@.venv/bin/python -m ruff check -q .
	@JAX_PLATFORMS=cpu $(pytest) -m 'not slow and not scale and not gpu'

test-slow: install  ## run the tests that take minutes each
	@JAX_PLATFORMS=cpu $(pytest) -m 'slow and not gpu'

test-scale: install  ## run the proofs of scale: every layout of the mesh, and what each is lowered to
	@JAX_PLATFORMS=cpu $(pytest) -m 'scale and not gpu'

test-gpu: install  ## run the tests that need an NVIDIA GPU (install the cuda extra first)
	@JAX_PLATFORMS=cuda $(pytest) -n 0 -m gpu

extras: install  ## check that the extras for GPU, TPU, more data and evaluation resolve; asks the package index, installs nothing
	@for extra in cuda tpu data eval; do \
	  .venv/bin/python $(pip) install --dry-run -c $(pins) --no-build-isolation -e ".[$$extra]" && echo "$$extra: resolves" || exit 1; \
	done

constraints: interpreter  ## write constraints/python3.X.txt again from the newest versions that setup.cfg allows
	@$(PYTHON) -m venv --clear .cache/constraints
	@.cache/constraints/bin/python $(pip) install -U setuptools
	@.cache/constraints/bin/python $(pip) install --no-build-isolation -e '.[test]'
	@{ echo '# Written by `make constraints` on Python 3.$(minor): the core and the test tools.'; \
	  .cache/constraints/bin/python $(pip) freeze --all --exclude pip --exclude-editable; } > constraints/python3.$(minor).txt
	@rm -rf .cache/constraints

clean:  ## remove .venv and every cache; runs/ stays
	@rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
