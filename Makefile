# `make quickstart` runs the whole comparison at toy size; `make test` runs the tests. Each target makes .venv first.
PYTHON ?= python3
UV_VERSION := 0.13.9
STAMP := .venv/.complete

.PHONY: quickstart env test test-slow test-slurm lint format docs schema lock clean

quickstart: $(STAMP)
	.venv/bin/nrcg run quickstart

env: $(STAMP)

# uv installs the lock file several times faster than pip; where it cannot be had, pip does.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'nrcg needs Python 3.11 or newer; name one by: make PYTHON=python3.12 $(MAKECMDGOALS)'; exit 1; }
	@echo 'Creating .venv (about 7 GB, mostly PyTorch with CUDA; half a minute to some minutes) ...'
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@{ .venv/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION) && \
		.venv/bin/uv pip install --compile-bytecode $$(test -t 1 || echo --quiet) --python .venv/bin/python -r requirements.lock; } || \
		.venv/bin/pip install --disable-pip-version-check --progress-bar on -r requirements.lock
	@.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

test: $(STAMP)
	.venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m 'not slow and not slurm' -q

test-slow: $(STAMP)
	.venv/bin/python -m pytest -m 'slow and not slurm' -q

# Installs Snakemake's Slurm plugin; needs root, and Debian's packages slurmctld, slurmd and munge.
test-slurm: $(STAMP)
	.venv/bin/pip install --quiet --disable-pip-version-check -e '.[slurm]'
	.venv/bin/python -m pytest -m slurm -q

lint: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/snakefmt --check Snakefile workflow
	PATH="$(CURDIR)/.venv/bin:$$PATH" snakemake --lint

format: $(STAMP)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	.venv/bin/snakefmt Snakefile workflow

# The documentation as a site, into site/; a broken link or docstring is an error.
docs: $(STAMP)
	.venv/bin/mkdocs build --strict --quiet

# What is generated from the models of config.yaml.
schema: $(STAMP)
	.venv/bin/nrcg schema
	.venv/bin/nrcg schema --dvc
	.venv/bin/nrcg schema --docs

# Exact pins for Python 3.11 and newer, from the ranges of pyproject.toml.
lock: $(STAMP)
	.venv/bin/uv pip compile --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
		--extra pipeline --extra dev --extra docs pyproject.toml -o requirements.lock

clean:
	rm -rf .venv .nrcg .snakemake site
