# Everything runs in .venv, made from requirements.txt on first use.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test style types bench clean

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

test: install style types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests

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

clean:
	rm -rf .types build dist
