# TileSplat in two commands. A bare machine with Python >= 3.10, its venv module and a C++ compiler is enough (Debian,
# Ubuntu: apt install make g++ python3 python3-venv); a GPU is used if there is one.
#
#   make demo      set up; train the sample scene, render and score its test views, write output/demo/report.html
#   make test      set up; run the tests
#
# Without make, `python tools/setup_env.py demo` is the first; `python tools/setup_env.py setup` sets up.
#
#   make setup     only set up                    make lint      check the form of Python, C++ and CUDA code
#   make setup-capture   set up, with what convert.py needs for photos and videos
#   make types     check types with pyright       make sanitize  run native tests under sanitizers
#   make format    put it into that form          make lock      resolve requirements*.in again
#   make clean     remove builds and the demo     make info      say what was built for what
#
# Where a Python with torch is active, it is used as it is, offline. Otherwise .venv/ is made, with exactly the
# packages of requirements.txt. `make ... ISOLATED=1` insists on .venv, `make ... PYTHON=python3.12` chooses.

PYTHON ?= $(firstword $(shell command -v python3 python python3.13 python3.12 python3.11 python3.10))
ISOLATED ?= 0
ITERATIONS ?= 1000
DEMO ?= output/demo
SAMPLE ?= output/sample
VIEWS ?= 60

ifeq ($(PYTHON),)
$(error Python was not found: install Python 3.10 or newer (Debian, Ubuntu: apt install python3 python3-venv g++), or say `make PYTHON=/path/to/python3`)
endif

# "as it is" if the active Python has torch and is not the .venv that we make ourselves
ACTIVE := $(shell $(PYTHON) tools/setup_env.py active)
ifeq ($(ISOLATED)$(ACTIVE),0yes)
  PY := $(PYTHON)
  STATE := .make/$(shell $(PYTHON) tools/setup_env.py name)
else
  PY := .venv/bin/python
  STATE := .venv
endif

NATIVE := submodules/diff-gaussian-rasterization
NATIVE_SOURCES := $(shell find $(NATIVE) -path $(NATIVE)/build -prune -o -type f \
    \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py' -o -name '*.toml' \) -print)
# One process for each core, four at most, which take tests from each other when they have no more of their own.
PARALLEL = --numprocesses=auto --maxprocesses=4 --dist=worksteal
export ITERATIONS DEMO SAMPLE VIEWS

SHELL := /bin/bash
.PHONY: demo test setup setup-capture packages packages-dev packages-capture lint types sanitize format lock info clean
.DELETE_ON_ERROR:

demo: $(STATE)/native
	@$(PY) tools/setup_env.py demo

test: export OMP_NUM_THREADS = 1
test: $(STATE)/native packages-dev
	$(PY) -m pytest $(PARALLEL)

setup: $(STATE)/native

setup-capture: $(STATE)/native packages-capture

# --- the environment ----------------------------------------------------------------------------------------

ifeq ($(STATE),.venv)
packages: .venv/packages
packages-dev: .venv/packages-dev
packages-capture: .venv/packages-capture
.venv/packages: requirements.txt
	@$(PYTHON) tools/setup_env.py venv .venv $<
	@touch $@
.venv/packages-dev: requirements-dev.txt .venv/packages
	@$(PYTHON) tools/setup_env.py venv .venv $<
	@touch $@
.venv/packages-capture: requirements-capture.txt .venv/packages
	@$(PYTHON) tools/setup_env.py venv .venv $<
	@touch $@
.venv/native: .venv/packages
else
packages:
	@mkdir -p $(STATE)
	@$(PY) tools/setup_env.py check requirements.in
packages-dev:
	@$(PY) tools/setup_env.py check requirements-dev.in
packages-capture:
	@$(PY) tools/setup_env.py check requirements-capture.in
$(STATE)/native: | packages
endif

$(STATE)/native: $(NATIVE_SOURCES)
	@$(PY) tools/setup_env.py native $(NATIVE)
	@touch $@

info:
	@$(PYTHON) tools/setup_env.py info $(PY)

# --- upkeep -------------------------------------------------------------------------------------------------

CLANG_FORMAT = $(PY) -c 'from clang_format import clang_format; raise SystemExit(clang_format())'
CXX_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

lint: packages-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(CXX_FILES)

format: packages-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CXX_FILES)

types: packages-dev $(STATE)/native
	$(PY) -m pyright --pythonpath $(PY)

# The CPU part with AddressSanitizer and UndefinedBehaviorSanitizer, built beside the real one, under all native
# tests but the slowest.
SANITIZER ?= address,undefined
SANITIZED := .make/sanitized
# Checks as calls, not inline: g++ compiles the long kernels in a fraction of the time.
SANITIZED_FLAGS = -fsanitize=$(SANITIZER) -fno-sanitize-recover=all --param asan-instrumentation-with-call-threshold=0
SANITIZED_TESTS = $(filter-out %_build.py %_determinism.py %_accuracy.py %_machines.py,$(wildcard tests/native/test_*.py))

sanitize: packages-dev $(STATE)/native
	rm -rf $(SANITIZED) && mkdir -p .make && cp -R $(NATIVE) $(SANITIZED) && rm -rf $(SANITIZED)/build
	cd $(SANITIZED) && TILESPLAT_CUDA=0 CXX="g++ $(SANITIZED_FLAGS)" \
	    $(abspath $(shell command -v $(PY))) setup.py -q build_ext --inplace
	PYTHONPATH=$(CURDIR)/$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 \
	    LD_PRELOAD=$$(ldd $(SANITIZED)/diff_gaussian_rasterization/libtilesplat.so | awk '/lib(asan|ubsan|tsan)/ {print $$3}' | paste -sd:) \
	    $(PY) -m pytest $(PARALLEL) -p no:cacheprovider --capture=sys $(SANITIZED_TESTS)

lock:
	uv pip compile --universal --python-version 3.10 --generate-hashes --no-header -q requirements.in -o requirements.txt
	uv pip compile --universal --python-version 3.10 --generate-hashes --no-header -q -c requirements.txt \
	    requirements-dev.in -o requirements-dev.txt
	uv pip compile --universal --python-version 3.10 --generate-hashes --no-header -q -c requirements.txt \
	    requirements-capture.in -o requirements-capture.txt

clean:
	rm -rf .venv/native .make $(NATIVE)/build $(SAMPLE) $(DEMO)
