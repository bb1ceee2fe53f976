# Every target does all of its own set-up in .venv with nothing but python3, its venv and pip. A second run finds it done.
#   make demo   run the main job: distil a small language model on real text (report in runs/demo/)
#   make test   run the tests
#   make check  lint, format, types
#   make bench  measure the losses on this machine
#   make clean  remove .venv and whatever was built

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
CSRC := $(shell find csrc -type f 2>/dev/null)

# The versions in constraints.txt are the tested ones. torch is pinned there for one more reason: unpinned, pip takes the newest
# build that any of its indexes offers, on Linux a CUDA build of gigabytes, even where a CPU build of an older release lies
# nearer. Pinned, a CPU build of that release (2.13.0+cpu) wins wherever pip has been told of one, since a local
# version sorts above the plain one.
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test check bench setup clean

demo: $(READY)
	$(VENV)/bin/kdkernels demo $(ARGS)

# Two processes share the machine's cores, so each runs torch on one thread; tests that are about threads set their own number.
# loadgroup keeps the tests of one xdist_group in one process, where they share what is slow to make (a built wheel).
test: $(READY)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadgroup $(ARGS)

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(READY)
	$(VENV)/bin/python -m benchmarks logits $(ARGS)

setup: $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info kdkernels/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Editable, so that what runs is this tree; without isolation, so that constraints.txt holds for the build as well.
$(READY): $(VENV)/bin/python pyproject.toml setup.py constraints.txt $(CSRC)
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[cli,bench,test,dev]'
	@touch $@
