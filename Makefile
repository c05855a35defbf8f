# Every target makes .venv when it is missing or when what it was made from has changed.

VENV := .venv
BIN := $(VENV)/bin
SERVING := .venv-serving
# The first that pyproject.toml takes: kernels are compiled with it as well.
OLDEST_TRITON := 3.6.0
CONSTRAINTS := tests/constraints.txt
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c $(CONSTRAINTS)

# The first Python that is new enough; make PYTHON=/path/to/python3.12 chooses another.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$python && break; done)

# On Linux, PyPI's torch brings gigabytes of CUDA libraries; a machine without an NVIDIA GPU takes the small build from
# torch's own index when it answers. make TORCH_INDEX= keeps to pip's usual index.
TORCH_INDEX ?= $(shell test "$$(uname -s)" = Linux && ! command -v nvidia-smi >/dev/null && echo https://download.pytorch.org/whl/cpu)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo studies-quick lab notebooks test test-serving serving-env check clean .venv

help:  ## list the targets
	@sed -n 's/^\([a-z.-]*\):[^#]*## /  make \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

demo: $(VENV)/base.stamp  ## plans for a real model on this machine, measured, with a report: runs/demo/report.html
	$(BIN)/moa-lab run --preset quick --model smollm2 --density 0.5 --out runs/demo

studies-quick: $(VENV)/base.stamp  ## every study, small, on this machine: runs/studies-quick/NAME.json; a second call makes what is missing
	$(BIN)/moa-lab study all --preset sketch --work runs/studies-quick/work --out runs/studies-quick

lab: $(VENV)/lab.stamp  ## JupyterLab on the notebooks, for this machine alone; ARGS="--run runs/demo" opens a run
	$(BIN)/moa-lab lab $(ARGS)

notebooks: $(VENV)/lab.stamp  ## run every notebook from first to last cell and keep the outputs
	$(BIN)/python -m moa_lab.workbench.notebooks notebooks/*.ipynb

# Status 5: ARGS selected no test of this part.
test: $(VENV)/dev.stamp $(VENV)/oldest-triton  ## run the tests, a worker a core; ARGS="-k plan" selects
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not alone" $(ARGS) || [ $$? -eq 5 ]
	$(BIN)/python -m pytest -m alone $(ARGS) || [ $$? -eq 5 ]

test-serving: $(SERVING)/serving.stamp  ## run the tests that need vLLM, in its environment (minutes); ARGS="-k parity" selects
	$(SERVING)/bin/python -m pytest tests/serving/engine $(ARGS) || [ $$? -eq 5 ]

serving-env: $(SERVING)/serving.stamp  ## make .venv-serving, with vLLM's build for CPUs and moa-lab beside it (some minutes, once)

check: $(VENV)/dev.stamp  ## lint, format, types, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## remove .venv, .venv-serving and caches; runs/ stays
	rm -rf $(VENV) $(SERVING) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find moa_lab tests data -name __pycache__ -type d -prune -exec rm -rf {} +

.venv: $(VENV)/base.stamp  ## the environment that the other targets use

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "moa-lab needs Python 3.11 or newer; here: $$(python3 --version 2>&1)." \
		"Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

# A failed attempt at the small torch is no error: the line after it takes torch from pip's usual index.
$(VENV)/torch.stamp: $(CONSTRAINTS) $(BIN)/python
	@test -z "$(TORCH_INDEX)" || { echo "installing torch (CPU build)"; \
		$(INSTALL) --retries 0 --timeout 10 --index-url "$(TORCH_INDEX)" torch >/dev/null 2>&1; } || true
	@touch $@

$(VENV)/base.stamp: pyproject.toml $(CONSTRAINTS) $(VENV)/torch.stamp
	@echo "installing moa-lab and what it needs (some minutes, once)"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/lab.stamp: pyproject.toml $(CONSTRAINTS) $(VENV)/torch.stamp
	@echo "installing moa-lab, what it needs, and JupyterLab (some minutes, once)"
	@$(INSTALL) -e ".[lab]"
	@touch $(VENV)/base.stamp $@

$(VENV)/dev.stamp: pyproject.toml $(CONSTRAINTS) $(VENV)/torch.stamp
	@echo "installing moa-lab, what it needs, JupyterLab, and the test tools (some minutes, once)"
	@$(INSTALL) -e ".[dev,lab,eval]"
	@touch $(VENV)/base.stamp $(VENV)/lab.stamp $@

# Beside the environment's own Triton; without it the tests that need it are skipped.
$(VENV)/oldest-triton: $(VENV)/dev.stamp
	@test "$$(uname -s)" != Linux || $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target $@ \
		triton==$(OLDEST_TRITON) 2>/dev/null || echo "triton $(OLDEST_TRITON) could not be installed: kernels are not compiled with it"
	@mkdir -p $@ && touch $@

# vLLM pins what it brings, so our constraints do not hold there; torchvision and its like, which it asks for and never needs for text,
# do not load beside the CPU build of torch.
$(SERVING)/serving.stamp: pyproject.toml
	@test -n "$(PYTHON)" || { echo "moa-lab needs Python 3.11 or newer; name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "making $(SERVING) (some minutes, once)"
	@$(PYTHON) -m venv --clear $(SERVING)
	@test -z "$(TORCH_INDEX)" || $(SERVING)/bin/python -m pip install --disable-pip-version-check --quiet --retries 0 --timeout 10 \
		--index-url "$(TORCH_INDEX)" torch==2.13.0 >/dev/null 2>&1 || true
	@$(SERVING)/bin/python -m pip install --disable-pip-version-check --quiet -e ".[serve]" torch==2.13.0 pytest pytest-timeout
	@$(SERVING)/bin/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
	@touch $@
