# `make demo` runs the quickstart on embedded data; `make test` runs the tests.
# Both set up .venv first.
PYTHON ?= python3
VENV := .venv
# Without cached bytecode, pytest rewrites all assertions anew in each of its processes.
unexport PYTHONDONTWRITEBYTECODE
BIN := $(VENV)/bin
OLDEST := .venv-oldest
EXTRAS := .venv-extras
WHEEL_VENV := .venv-wheel
LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-annotate -c constraints.txt
HASHED_INSTALL = $(BIN)/pip install --quiet --no-deps --require-hashes --only-binary :all:

.PHONY: demo test test-browser simulations test-slow scale test-scale test-kernels test-everywhere test-oldest test-extras trust lint docs dist lock hashed audit clean

demo: $(VENV)/.installed
	$(BIN)/robustsoup demo

test: $(VENV)/.installed-dev
	$(BIN)/pytest -n 2 --dist loadfile

# The longer tests: every family of recipes on digits, many kills.
test-slow: $(VENV)/.installed-dev
	$(BIN)/pytest -n 2 -m slow --durations=10

# Simulated searches with known true accuracies: how often is a statement wrong? Minutes; prints a table.
simulations: $(VENV)/.installed-dev
	$(BIN)/pytest -n 2 -m simulations -s

# The report in the Chromium of the system: hover, click, slider, keys, themes, paper, accessibility.
test-browser: $(VENV)/.installed-dev
	$(BIN)/pytest -m browser

# Several processes at length: under torchrun, on Ray, by submitit; same results, kills, Ctrl-C.
test-scale: $(VENV)/.installed-scale
	$(BIN)/pytest -n 2 -m scale --durations=10

# One machine as a cluster: torchrun with 1 to 3 processes, Ray with a killed worker, submitit; the
# same results, and the tables of docs/benchmarks.md. 20 minutes; SCALE=--small is a quick look.
scale: $(VENV)/.installed-scale
	$(BIN)/python benchmarks/scale.py $(SCALE)

# The numeric tests again with the kernels of older processors: no verdict depends on the processor.
# Without AVX-512, the processor's own kernels are those for AVX2, which `make test` used.
test-kernels: $(VENV)/.installed-dev
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/pytest -n 2 --dist loadfile -m kernels
	if grep -q avx512 /proc/cpuinfo; then \
		ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/pytest -n 2 --dist loadfile -m kernels; fi

# The suite with three kinds of kernels, two threads, a random order, other load and four more seeds.
test-everywhere: $(VENV)/.installed-dev
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/pytest -n 2
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/pytest -n 2
	$(BIN)/pytest -n 2
	ROBUSTSOUP_TEST_THREADS=2 $(BIN)/pytest
	order=$$(date +%s); echo "ROBUSTSOUP_TEST_ORDER=$$order"; ROBUSTSOUP_TEST_ORDER=$$order $(BIN)/pytest -n 2
	for loop in 1 2; do timeout 1h sh -c 'while :; do :; done' & busy="$$busy $$!"; done; \
	trap "kill $$busy" EXIT; $(BIN)/pytest -n 2
	for seed in 1 2 3 4; do \
		ROBUSTSOUP_TEST_SEED=$$seed $(BIN)/pytest -n 2 -m trained || exit 1; \
	done

# Kills, damage, fuzzing and other faults, many times over; docs/reliability.md quotes the table that
# it prints. ROBUSTSOUP_TRUST_SHARE=0.01 is a quick look, ROBUSTSOUP_FUZZ_SECONDS=600 the long fuzzing.
trust: $(VENV)/.installed-dev
	$(BIN)/pytest -m trust

# Ruff's rules, its formatter and the type check.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

# Builds docs/_build/html; a warning or a broken internal link fails the build.
docs: $(VENV)/.installed-dev
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going -b html docs docs/_build/html

# Builds the sdist and the wheel, then tries the wheel in an empty environment.
dist: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m venv --clear $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/pip install --quiet -c constraints.txt dist/*.whl
	cd $(WHEEL_VENV) && bin/python ../tests/docs/check_wheel.py

# Makes requirements-ci.txt anew. uv asks the public index alone: it reads no settings of pip.
lock: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet uv
	sed '/^$$/,$$d' requirements-ci.txt > requirements-ci.txt.new
	echo >> requirements-ci.txt.new
	$(LOCK) --extra dev --group hosted --no-emit-package torch pyproject.toml >> requirements-ci.txt.new
	printf 'torchattacks\nrobustbench\n' | $(LOCK) --no-deps - >> requirements-ci.txt.new
	mv requirements-ci.txt.new requirements-ci.txt

# Sets up .venv from files with the digests in requirements-ci.txt, before any other target. PyTorch
# has no digest there: each of its builds has another. robustbench: see .installed-dev.
hashed:
	$(PYTHON) -m venv --clear $(VENV)
	$(HASHED_INSTALL) -r requirements-ci.txt
	sed -n '/^robustbench==/,/[^\\]$$/p' requirements-ci.txt | $(HASHED_INSTALL) --force-reinstall -r /dev/stdin
	$(BIN)/pip install --quiet --no-deps --only-binary :all: -c constraints.txt torch
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $(VENV)/.installed $(VENV)/.installed-dev

# Asks the public databases for known vulnerabilities of all pinned dependencies, PyTorch included.
audit: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet pip-audit
	$(BIN)/pip-audit --disable-pip --require-hashes -r requirements-ci.txt
	$(BIN)/pip-audit --disable-pip --no-deps -r constraints.txt
	$(BIN)/pip-audit --disable-pip --no-deps -r constraints-extras.txt

# Runs the suite with the oldest dependencies that pyproject.toml promises.
# Downloads PyTorch's CUDA build (gigabytes) once.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/pytest -n 2 --ignore tests/docs

# Tests with the real timm, transformers, torchvision and robustbench, in an environment of its own:
# torchvision must fit PyTorch to the version, and robustbench asks for another timm. The notebooks
# of examples/ run there too.
test-extras: $(EXTRAS)/.installed
	$(EXTRAS)/bin/pytest -n 2 -m extras

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "robustsoup needs Python 3.11 or later: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps torchattacks
	$(BIN)/pip install --quiet -c constraints.txt --no-deps --force-reinstall robustbench
	touch $@

$(VENV)/.installed-scale: $(VENV)/.installed-dev constraints-extras.txt
	$(BIN)/pip install --quiet -c constraints.txt -c constraints-extras.txt -e '.[ray,slurm]'
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/pip install --quiet -c constraints-oldest.txt -e '.[test]'
	$(OLDEST)/bin/pip install --quiet -c constraints.txt --no-deps robustbench
	touch $@

$(EXTRAS)/.installed: pyproject.toml constraints.txt constraints-extras.txt
	$(PYTHON) -m venv --clear $(EXTRAS)
	$(EXTRAS)/bin/pip install --quiet -c constraints.txt -c constraints-extras.txt -e '.[test,timm,hf,torchvision,tensorboard,datasets,webdataset,notebooks]' peft torchdiffeq geotorch pandas gdown s3fs 'moto[s3]' flask flask-cors setuptools
	$(EXTRAS)/bin/pip install --quiet -c constraints.txt --no-deps robustbench
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(EXTRAS) $(WHEEL_VENV) build dist docs/_build .pytest_cache .hypothesis .ruff_cache
