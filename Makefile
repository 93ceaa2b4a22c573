# Everything runs in .venv, made from requirements.txt on first use.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test style types bench kernels-lint clean

install: $(VENV)/.installed

# torch first and pinned: an unpinned torch brings gigabytes of CUDA packages to a CPU machine. TORCH overrides it where
# a GPU build is wanted (make install TORCH="torch==2.13.0 --index-url ...").
TORCH ?= torch==2.13.0
$(VENV)/.installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

quickstart: install
	$(BIN)/python -m loopline.launchers.quickstart

# A file's tests share fixtures, so they stay in one process. TEST_WORKERS=0 runs everything in this one.
TEST_WORKERS ?= 2
test: install style types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

style: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow editable installs; give it the namespace as folders.
PACKAGES := kernels models data_pipeline pretrain launchers
types: install
	mkdir -p .types/loopline
	for package in $(PACKAGES); do ln -sfn ../../$$package .types/loopline/$$package; done
	cd .types && MYPYPATH=. ../$(BIN)/python -m mypy --config-file ../pyproject.toml --namespace-packages --explicit-package-bases loopline

bench: install
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python -m loopline.kernels.bench

# The installed Triton is checked by `make test`. 3.6.0 is what torch 2.10 and 2.11 pin, 3.7.1 torch 2.12.1 and 2.13.
LINT_TRITONS ?= 3.6.0 3.7.1 3.9.0
kernels-lint:
	set -e; for version in $(LINT_TRITONS); do \
		test -d .lint/$$version || { $(PYTHON) -m venv .lint/$$version; \
			.lint/$$version/bin/python -m pip install --quiet $(TORCH) numpy; \
			.lint/$$version/bin/python -m pip install --quiet triton==$$version; \
			.lint/$$version/bin/python -m pip install --quiet --no-deps --editable .; }; \
		.lint/$$version/bin/python -m loopline.kernels.lint; \
	done

clean:
	rm -rf .types .lint build dist
