# Every target does all of its own set-up in .venv, with nothing but python3, its venv and pip, and a C++
# compiler where there is one. Once that is done, it is not done again until what it depends on changes.
#
#   make demo    the main job: distil a small language model on real text; the report is in runs/demo/
#                (ARGS=--cached: from a stored teacher, too)
#   make test    the tests (ARGS=--thorough: also those whose path in the code another one takes)
#   make fuzz    ten minutes (MINUTES=10) of random calls over all options, new ones each time, every backend that
#                runs here against the fp64 truth; prints the cases of each and what failed, with what reproduces it
#   make check   lint, format, types
#   make docs    the documentation as a site, in build/site; a broken link fails
#   make bench   the losses measured on this machine, beside eager PyTorch and torch.compile: the first figures after
#                a minute, a report for the browser in runs/bench (ARGS=--quick: half a minute; ARGS=--help)
#   make compare all of that beside liger-kernel, TRL and others, and language models end to end: 15
#                minutes on a machine that does nothing else; into benchmarks/results (ARGS=--quick: less, elsewhere)
#   make gpu     the tests that need a GPU and the losses measured on it: with $(PYTHON) itself, which needs
#                torch, Triton, pytest and hypothesis; nothing is installed
#   make clean   remove .venv and whatever was built
#
# ARGS="..." passes options on, PYTHON=python3.12 picks the Python that .venv is made with, or make gpu runs,
# SHARDS=8 in how many processes make gpu tests.

PYTHON ?= python3
ARGS ?=
MINUTES ?= 10
SHARDS ?= 8

VENV := .venv
LIGHT := $(VENV)/.light
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers
CSRC := $(shell find csrc -type f)

# The versions in constraints.txt are the tested ones. torch is pinned there for one more reason: unpinned, pip
# takes the newest build that any of its indexes offers, on Linux a CUDA build of gigabytes, even where it was
# told of a CPU build of an older release. Pinned, the CPU build of that release (2.13.0+cpu) wins wherever pip
# knows of one, since a local version sorts above the plain one.
INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test fuzz check docs bench compare gpu setup clean

demo: $(READY)
	$(VENV)/bin/kdkernels demo $(ARGS)

# Two processes share the cores, so OpenMP gets one thread in each; tests about threads set their own number.
# What some files share, slow to make (a wheel), is made in one of them: tests/conftest.py sends such a file whole.
test: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 $(ARGS)

fuzz: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/fuzz.py --minutes $(MINUTES) $(ARGS)

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# No build of the site waits for the network: fonts, search and formulas are in it.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml $(ARGS)
	@echo "The site is in build/site: open build/site/index.html"

# With no more than it needs, so that a first figure is there early.
bench: $(LIGHT)
	$(VENV)/bin/kdkernels bench $(ARGS)

compare: $(PEERS)
	$(VENV)/bin/python -m benchmarks compare $(ARGS)

# Not in .venv: torch there is a CPU build, and a machine with a GPU has one that fits it. What is slow or wrong
# is measured all the same when a test fails, and make fails in the end.
gpu:
	@$(PYTHON) -m benchmarks gpu --probe
	@mkdir -p build && rm -f build/gpu-tests-*.log
	@echo "Tests, in $(SHARDS) processes: most of the time goes into compiling a kernel for each kind of call."
	@running=; tests=0; \
	for i in $$(seq $(SHARDS)); do \
	  $(PYTHON) -m pytest -m gpu -q --shard $$i/$(SHARDS) >build/gpu-tests-$$i.log 2>&1 & running="$$running $$!"; \
	done; \
	for process in $$running; do wait $$process || tests=1; done; \
	if [ $$tests = 0 ]; then tail -qn 1 build/gpu-tests-*.log; else cat build/gpu-tests-*.log; fi; \
	$(PYTHON) -m benchmarks gpu $(ARGS) || tests=1; \
	$(PYTHON) -m benchmarks cluster || [ $$? = 2 ] || tests=1; \
	$(PYTHON) -m benchmarks linear --device cuda || tests=1; \
	$(PYTHON) -m benchmarks divergences --device cuda --dtype bfloat16 --no-compile \
	  --json benchmarks/results/divergences-cuda.json && exit $$tests

setup: $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info kdkernels/*.so .mypy_cache .pytest_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Editable, so that what runs is this tree; without isolation, so that constraints.txt holds for the build too.
$(LIGHT): $(VENV)/bin/python pyproject.toml setup.py constraints.txt $(CSRC)
	@echo "Setting up $(VENV): the first time this downloads torch and takes minutes."
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable '.[cli,bench]'
	@test -e kdkernels/libkdkernels_cpu.so || echo "Without the CPU library, since no C++ compiler works here:" \
	  "losses run on the reference backend. With a compiler installed, 'make -B setup' builds it."
	@touch $@

$(READY): $(LIGHT)
	$(INSTALL) --no-build-isolation --editable '.[cli,bench,train,hf,test,dev,docs]'
	@touch $@

$(PEERS): $(READY)
	$(INSTALL) --no-build-isolation --editable '.[cli,bench,hf,peers]'
	@touch $@
