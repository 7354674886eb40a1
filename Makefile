# TileSplat in two commands. A bare machine with Python >= 3.10, its venv module and a C++ compiler is enough (Debian,
# Ubuntu: apt install make g++ python3 python3-venv); a GPU is used if there is one.
#
#   make demo      set up; train the sample scene, render and score its test views, write output/demo/report.html
#   make test      set up; run the tests
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
PYTHON_SOURCES := train.py render.py metrics.py $(shell find arguments gaussian_renderer per_view scene strategies training utils -name '*.py')
# A thirtieth of the published length: steps are larger, and Gaussians are added from the start and more sparingly.
SHORT = --iterations $(ITERATIONS) --test_iterations $(ITERATIONS) --position_lr_max_steps $(ITERATIONS) \
    --position_lr_init 0.0003 --feature_lr 0.01 --opacity_lr 0.05 --scaling_lr 0.015 \
    --densify_from_iter 150 --densify_until_iter $$(($(ITERATIONS) * 3 / 4)) --densify_grad_threshold 0.0004
OURS := $(DEMO)/test/ours_$(ITERATIONS)

SHELL := /bin/bash
.PHONY: demo test setup setup-capture packages packages-dev packages-capture lint types sanitize format lock info clean
.DELETE_ON_ERROR:

demo: $(DEMO)/contact_sheet.png $(DEMO)/report.html
	@grep -v '^Next' $(DEMO)/metrics.txt
	@echo "Ground truth, render and error side by side: $(DEMO)/contact_sheet.png"
	@echo "All about it on one page, for your browser: $(DEMO)/report.html"

test: $(STATE)/native packages-dev
	$(PY) -m pytest

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

# --- the demo -----------------------------------------------------------------------------------------------

$(SAMPLE)/sparse/0/points3D.bin: $(wildcard sample_scene/*.py) | $(STATE)/native
	$(PY) -m sample_scene $(SAMPLE) --views $(VIEWS)

$(DEMO)/point_cloud/iteration_$(ITERATIONS)/point_cloud.ply: $(SAMPLE)/sparse/0/points3D.bin $(STATE)/native $(PYTHON_SOURCES)
	$(PY) train.py -s $(SAMPLE) -m $(DEMO) --overwrite --eval --disable_viewer $(SHORT)

$(OURS)/names.json: $(DEMO)/point_cloud/iteration_$(ITERATIONS)/point_cloud.ply
	$(PY) render.py -m $(DEMO) --iteration $(ITERATIONS) --skip_train

$(DEMO)/metrics.txt: $(OURS)/names.json
	$(PY) metrics.py -m $(DEMO) > $@

$(DEMO)/contact_sheet.png: $(DEMO)/metrics.txt tools/contact_sheet.py
	$(PY) -m tools.contact_sheet -m $(DEMO) --iteration $(ITERATIONS)

$(DEMO)/report.html: $(DEMO)/metrics.txt report.py $(wildcard viewer/*)
	$(PY) report.py -m $(DEMO)

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
SANITIZED_TESTS = $(filter-out %_build.py %_determinism.py %_accuracy.py,$(wildcard tests/native/test_*.py))

sanitize: packages-dev $(STATE)/native
	rm -rf $(SANITIZED) && mkdir -p .make && cp -R $(NATIVE) $(SANITIZED) && rm -rf $(SANITIZED)/build
	cd $(SANITIZED) && TILESPLAT_CUDA=0 CXX="g++ $(SANITIZED_FLAGS)" \
	    $(abspath $(shell command -v $(PY))) setup.py -q build_ext --inplace
	PYTHONPATH=$(CURDIR)/$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 \
	    LD_PRELOAD=$$(ldd $(SANITIZED)/diff_gaussian_rasterization/libtilesplat.so | awk '/lib(asan|ubsan|tsan)/ {print $$3}' | paste -sd:) \
	    $(PY) -m pytest -p no:cacheprovider --capture=sys $(SANITIZED_TESTS)

lock:
	uv pip compile --universal --python-version 3.10 --generate-hashes --no-header -q requirements.in -o requirements.txt
	uv pip compile --universal --python-version 3.10 --generate-hashes --no-header -q -c requirements.txt \
	    requirements-dev.in -o requirements-dev.txt
	uv pip compile --universal --python-version 3.10 --generate-hashes --no-header -q -c requirements.txt \
	    requirements-capture.in -o requirements-capture.txt

clean:
	rm -rf .venv/native .make $(NATIVE)/build $(SAMPLE) $(DEMO)
