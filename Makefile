# make demo / test / scripts / lowest / areal / ray / native / check / site / bench / plot / screenshots. Each makes .venv by itself.
# NO_VENV=1 PYTHON=/path/to/python uses that interpreter as it is, and installs nothing into it.
# areal, ray, lowest and site have environments of their own beside it, also with NO_VENV=1: .venv-areal and so on.
PYTHON ?= python3
ARGS ?=
SITE_PACKAGES := "mkdocs<2" "mkdocs-material>=9.5" "mkdocstrings[python]>=0.27"
# What `make plot` draws: as written by make bench ARGS="--json docs/benchmark.json".
FILE ?= docs/benchmark.json

ifdef NO_VENV
PY := $(PYTHON)
READY :=
PARALLEL :=
else
PY := .venv/bin/python
READY := .venv/.ready
# pytest-xdist: one process of tests for each core, up to four.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal
endif

.PHONY: help demo test scripts lowest areal ray native check site bench plot screenshots clean

help:
	@echo "make demo   train a small policy through the cache (options: ARGS=\"--steps 10 --seed 1\")"
	@echo "make demo BACKEND=areal  the same over AReaL's own controllers and servers (options: ARGS=\"--steps 10\")"
	@echo "make demo BACKEND=ray  the same with Ray's actors as workers, over its object store"
	@echo "make test   run the tests"
	@echo "make scripts  run the tests of whole scripts and processes: demo, benchmark, soak, exits, README's commands"
	@echo "make lowest  run the tests of server, client and tool with the oldest releases that pyproject.toml allows"
	@echo "make areal  run the tests that need AReaL, beside AReaL 1.0.4 in a virtual environment of its own"
	@echo "make ray    run the tests that need Ray, beside Ray 2.60 or RAY_VERSION in a virtual environment of its own"
	@echo "make native  build the C++ functions, and run the tests of blocks and hits with them"
	@echo "make check  lint, format, types, import ranks"
	@echo "make site   build the documentation as a site, in site/"
	@echo "make bench  time the paths side by side (options: ARGS=--quick, ARGS=\"--json docs/benchmark.json\")"
	@echo "make screenshots  take the README's pictures of gpu-cache-smi from runs of the demo (needs a Chromium)"
	@echo "make plot   draw docs/benchmark.png and .svg from docs/benchmark.json (another file: FILE=...)"

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --config-settings editable_mode=compat -e ".[dev]"
	@touch $@

# $(call beside,KIND,ARGUMENTS): Python in the environment KIND. Exit 3: the package index cannot be reached, and the
# script says so.
define beside
@$(PY) scripts/beside_venv.py $(1); found=$$?; \
	if [ $$found -eq 3 ]; then exit 0; elif [ $$found -ne 0 ]; then exit $$found; fi; \
	.venv-$(1)/bin/python $(2)
endef

ifeq ($(BACKEND),areal)
demo: $(READY)
	$(call beside,areal,scripts/areal_demo.py $(ARGS))
else ifeq ($(BACKEND),ray)
demo: $(READY)
	$(call beside,ray,scripts/ray_demo.py $(ARGS))
else
demo: $(READY)
	$(PY) scripts/train_demo.py $(ARGS)
endif

test: $(READY)
	$(PY) -m pytest $(PARALLEL) $(ARGS)

lowest: export PYTHONPATH := $(CURDIR)
lowest: $(READY)
	$(call beside,lowest,-m pytest $(PARALLEL) $(ARGS) tests/rpc tests/report tests/smi)

areal: $(READY)
	$(call beside,areal,-m pytest -m areal $(ARGS) tests/beside_areal)

ray: export PYTHONPATH := $(CURDIR)
ray: $(READY)
	$(call beside,ray,-m pytest -m ray $(ARGS) tests/beside_ray)

# Exit 2: no compiler.
native: export GPU_CACHE_NATIVE_DIR := $(CURDIR)/.venv/native
native: $(READY)
	@GPU_CACHE_NATIVE=0 $(PY) -m gpu_cache.native; found=$$?; \
	if [ $$found -eq 2 ]; then echo "SKIPPED: the C++ functions are not built"; exit 0; elif [ $$found -ne 0 ]; then exit $$found; fi; \
	GPU_CACHE_NATIVE=1 $(PY) -m pytest tests/native tests/pool/test_lease.py tests/pool/test_slab.py tests/index/test_loans.py tests/index/test_index.py $(ARGS)

scripts: $(READY)
	$(PY) -m pytest -m "scripts and not slow" $(PARALLEL) $(ARGS)

# In C++ where a compiler is; `make bench GPU_CACHE_NATIVE=0` times what Python does without it.
bench: export GPU_CACHE_NATIVE_DIR := $(CURDIR)/.venv/native
bench: $(READY)
	@[ "$$GPU_CACHE_NATIVE" = 0 ] || $(PY) -m gpu_cache.native || [ $$? -eq 2 ]
	$(PY) scripts/benchmark.py $(ARGS)

plot: $(READY)
	$(PY) scripts/plot_benchmark.py $(FILE) -o docs/benchmark

screenshots: $(READY)
	$(PY) scripts/screenshots.py $(ARGS)

check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m mypy --strict --config-file= tests/typed_user.py
	$(PY) -m pytest -q tests/test_imports.py

# MkDocs needs nothing of the project. Broken links and names without docstrings end it.
site:
	@test -x .venv-site/bin/mkdocs || { $(PYTHON) -m venv .venv-site && \
	.venv-site/bin/python -m pip install --quiet --disable-pip-version-check $(SITE_PACKAGES); } || \
	{ rm -rf .venv-site; echo "SKIPPED: the package index cannot be reached"; exit 0; }; \
	NO_MKDOCS_2_WARNING=1 .venv-site/bin/mkdocs build --quiet

clean:
	rm -rf .venv .venv-areal .venv-lowest .venv-ray .venv-site site build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
