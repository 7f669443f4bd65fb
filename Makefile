# Every target sets up what it needs: a virtual environment, filled from the package registry.
# `make demo` and `make test` are all that a fresh clone needs.

PYTHON ?= python3
PYTEST_ARGS ?=
FLOOR := 5.17.0

# One thread a process: the tests run in two processes.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo checkpoint test test-floor check format clean

help:
	@echo "make demo        ask a small trained LLaVA about drawn pictures, unpruned and pruned"
	@echo "make test        all tests, newest transformers"
	@echo "make test-floor  the common tests, transformers $(FLOOR)"
	@echo "make check       formatting, lint, types, model cards"
	@echo "make format      rewrite the code as 'make check' wants it"

demo: .venv/.installed
	.venv/bin/fsr-hf demo

test: .venv/.installed
	.venv/bin/python -m pytest -n 2 --dist loadgroup $(PYTEST_ARGS)

test-floor: .venv-floor/.installed
	.venv-floor/bin/python -m pytest -n 2 --dist loadgroup -m "not newest" $(PYTEST_ARGS)

check: .venv/.installed
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/python -m fsr_hf.hub.card_checks

checkpoint: .venv/.installed  # after a change of the code or of the results that it carries along
	cp docs/quality.json checkpoints/shapes-vqa/quality.json
	rm -rf build/shapes-vqa-new && mkdir -p build
	.venv/bin/fsr-hf export checkpoints/shapes-vqa build/shapes-vqa-new --base-model shapes-vqa
	rm -rf checkpoints/shapes-vqa
	mv build/shapes-vqa-new checkpoints/shapes-vqa

format: .venv/.installed
	.venv/bin/ruff format
	.venv/bin/ruff check --fix

# The stamp is the last step, so an interrupted installation is taken up again.
.venv/.installed: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check --editable ".[dev]"
	touch $@

.venv-floor/.installed: pyproject.toml
	test -x .venv-floor/bin/python || $(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --disable-pip-version-check --editable ".[dev]" "transformers==$(FLOOR)"
	touch $@

clean:
	rm -rf .venv .venv-floor .pytest_cache .ruff_cache .mypy_cache build dist
