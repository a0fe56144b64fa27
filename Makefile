# make demo   the first thing to run: installs into .venv, then `foveate compare`
# make new    the first files of a new system: make new KEY=my_gate ROOM=nn SEAM=gate
# make test   the tests; make test-all adds the slow ones; make lint checks style, types and the floors;
#             make typecheck runs a part of the tests with every annotation checked
# make parity compares with implementations by others: installs all of these, also those that `make test` skips
# make real   fetches two pretrained models (740 MB, once), compares six cache policies on them and runs the tests marked
#             `real`; FULL=1 measures all policies for docs/real.md
# make bench  every benchmark; make claims / studies / systems / docs rewrite what is generated under docs/
# make docs-site  the documentation as a site that needs no network: build/site/index.html
#
# PYTHON=python3.12 chooses the interpreter. On a machine without a GPU, PyPI's torch for Linux brings CUDA along;
# TORCH_INDEX=https://download.pytorch.org/whl/cpu gets the small build instead.

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# the installed set is current while these two files say the same
STAMP := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
INSTALLED := $(VENV)/installed-$(STAMP)
INSTALLED_DEV := $(VENV)/installed-dev-$(STAMP)
# tests run two at a time, one thread each: with more, small tensors on busy cores become several times slower
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo install install-dev new test test-all typecheck real parity lint format bench claims studies systems models mutants picture notebooks docs docs-site clean

demo: $(INSTALLED)
	$(BIN)/foveate compare

install: $(INSTALLED)

install-dev: $(INSTALLED_DEV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch goes first and by itself, so that its index can be chosen; what it needs comes with the rest, from PyPI as pinned
$(INSTALLED): | $(BIN)/python
	@echo "installing into $(VENV): torch and transformers are large, this takes a few minutes the first time"
	$(PIP) install $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) -c constraints.txt torch==2.13.0
	$(PIP) install -c constraints.txt -e .
	@rm -f $(VENV)/installed-*
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

test: $(INSTALLED_DEV)
	$(PYTEST) -m "not slow and not real"

test-all: $(INSTALLED_DEV)
	$(PYTEST) -m "not real"

# a part of the tests with the annotations of every call checked, shapes included (tests/support/typecheck.py); TESTS=...
# chooses other tests. Tests of gradients are left out, which repeat the same calls many times, and of compiled graphs,
# which the checks break
TESTS ?= tests/contracts/test_operators.py tests/contracts/test_layers.py tests/core tests/ops tests/nn
typecheck: $(INSTALLED_DEV)
	FOVEATE_TYPECHECK=1 $(PYTEST) -m "not slow and not real" -k "not grad and not one_graph" $(TESTS)

# every peer, also those that `make test` skips. timm goes where nothing else sees it, and without torchvision, which
# what is compared here does not need
parity: $(INSTALLED_DEV)
	$(PIP) install -c constraints.txt -e '.[parity]'
	$(PIP) install -c constraints.txt --no-deps --upgrade --target $(VENV)/peers timm
	PYTHONPATH=$(VENV)/peers $(PYTEST) tests/parity

# two pretrained models without a hub: fetched once, cache policies compared, and the tests that need them
real: $(INSTALLED_DEV)
	PYTHONPATH=. $(BIN)/python benchmarks/real/reference.py $(if $(FULL),,--quick)
	$(BIN)/python -m pytest -m real tests/real

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# each benchmark's last line, its ratios, stays in docs/measured for the README
bench: $(INSTALLED_DEV)
	@mkdir -p docs/measured; set -e; for file in benchmarks/[a-z]*.py; do echo "== $$file"; \
		$(BIN)/python $$file > .bench.out; cat .bench.out; \
		tail -n 1 .bench.out > docs/measured/$$(basename $$file .py).json; done; rm -f .bench.out

# CLAIMS="tests/systems/nn/test_hilo.py" runs these files alone and keeps the rows of all other systems
claims: $(INSTALLED_DEV)
	rm -rf .claims
	FOVEATE_CLAIMS=.claims $(PYTEST) $(or $(CLAIMS),tests/systems)
	$(BIN)/python -m tests.support.claims $(if $(CLAIMS),--keep) .claims

# every study's statements, predictions and measurements: docs/studies.md. KEYS="scan_and_snap" runs only these again
studies: $(INSTALLED_DEV)
	$(ONE_THREAD) $(BIN)/python docs/studies.py $(KEYS)

# the first files of a new system, each part of which fails until it is written: docs/new.py. Only words of the command
# line count, since an environment may have such names for other things
new: $(INSTALLED_DEV)
	@$(BIN)/python docs/new.py $(foreach word,KEY ROOM SEAM CLASS FOLDER TITLE YEAR ARXIV AUTHORS,\
		$(if $(filter command,$(origin $(word))),'$(word)=$(subst ','\'',$($(word)))'))

# what the classes say of themselves, for `foveate systems` and docs/systems.md
systems: $(INSTALLED_DEV)
	$(BIN)/python docs/systems.py

# every causal architecture of transformers, and what apply() does on it: docs/models.md. A new release of transformers
# is one run of this
models: $(INSTALLED_DEV)
	$(ONE_THREAD) $(BIN)/python docs/models.py

# changes to the code that the tests should notice: docs/mutants.md. KEYS="kv mega" does only these rooms, systems or files again
mutants: $(INSTALLED_DEV)
	$(PIP) install -c constraints.txt -e '.[mutants]'
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python docs/mutants.py $(KEYS)

# the recall figure as a picture; a run that is complete is only drawn again
picture: $(INSTALLED)
	$(BIN)/python benchmarks/recall.py
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=960,600 --screenshot=docs/recall.png \
		file://$(CURDIR)/foveate-recall.html
	$(BIN)/python docs/view.py
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1100,1000 --screenshot=docs/view.png \
		file://$(CURDIR)/build/view.html

# the tutorials, with the outputs of this run
notebooks: $(INSTALLED_DEV)
	$(ONE_THREAD) $(BIN)/python docs/notebooks/run.py

docs: claims studies systems picture notebooks
	$(BIN)/foveate compare
	$(BIN)/python docs/fill.py

# the guides, the API of every public name and a page for each system. Warnings are errors; then every link is followed,
# and what a page loads has to lie beside it
docs-site: $(INSTALLED_DEV)
	$(PIP) install -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict
	$(BIN)/python docs/site/check.py build/site

clean:
	rm -rf $(VENV) .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
