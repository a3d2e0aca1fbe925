# Everything runs in .venv, which `make install` creates once; later calls install nothing until the build files change.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
DOCS   := $(VENV)/.docs
# Test processes: one more than cores, since some tests wait, and 4 at most, since each takes 1 to 2 GB.
WORKERS = $(shell $(PY) -c "import os; print(min(4, (os.cpu_count() or 1) + 1))")
BUILD  := pyproject.toml setup.py MANIFEST.in $(wildcard csrc/*)

.PHONY: help install test faults demo bench gpu-check lint audit docs clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info < (3, 14) else \
	  "error: Python 3.10 to 3.13 is needed, found %d.%d; choose another with make PYTHON=python3.12" % sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(STAMP): $(BUILD) | $(PY)
	@$(PY) -m pip --version > /dev/null 2>&1 || $(PY) -m ensurepip
	$(PY) -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

install: $(STAMP)  ## create .venv, build and install the package
	@$(PY) -c 'from vjepa_fast.ops import _cpp; print(_cpp.status())'

# Without bytecode every process of the tests would compile all modules anew. A test that hangs fails by name.
test: install  ## run the tests (ARGS="-k name" passes on to pytest)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist loadgroup --timeout 900 $(ARGS)

faults: install  ## 50 kills of runs, 500 damaged checkpoints, 1,000 damaged recipes, lists and caches (tests/faults/*.json)
	OMP_NUM_THREADS=1 $(PY) tests/faults/kill.py $(ARGS)
	OMP_NUM_THREADS=1 $(PY) tests/faults/fuzz.py

demo: install  ## videos, pretraining, evaluation, report in runs/demo
	$(VENV)/bin/vjepa-fast demo $(ARGS)

bench: install  ## every op against the published algorithm, eager PyTorch and torch.compile
	$(PY) benchmarks/bench_ops.py $(ARGS)

gpu-check:  ## all tests and benchmarks that need a GPU; PYTHON as it is, nothing is installed (OUT=results.json)
	$(PYTHON) benchmarks/gpu_check.py $(if $(OUT),--out '$(OUT)') $(ARGS)

lint: install  ## style, formatting and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) -m pyright --pythonpath $(PY) -p pyright-strict.json

audit: install  ## what is installed against the list of known vulnerabilities (needs a network)
	@$(PY) -m pip install -q --disable-pip-version-check pip-audit || \
	  { echo "error: pip-audit cannot be installed; is there a network?" >&2; exit 1; }
	@$(PY) -m pip_audit --local --skip-editable --progress-spinner off || \
	  { echo "error: a package above has a known vulnerability, or the list could not be reached (is there a network?)" >&2; exit 1; }

$(DOCS): $(STAMP)
	$(PY) -m pip install -q --disable-pip-version-check -e '.[docs]'
	@touch $@

docs: $(DOCS)  ## the documentation as a site in site/; a warning is an error
	$(PY) docs/tables.py --check
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet $(ARGS)

clean:  ## remove .venv and build products
	rm -rf $(VENV) build site *.egg-info vjepa_fast/_C.so
