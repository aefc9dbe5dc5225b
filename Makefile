# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-slow lint format bench bench-smoke clean

# pip and venv: the stamp makes an unchanged project install once.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

# Threads that wait do not spin: beside other work that would take several times as long.
demo: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(BIN)/jbrprune demo --out demo

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python scripts/bench_cost.py --model test_vit --model-arg img_size=32 --data digits --weights trained \
		--images 256 --what jbr l1 taylor weights/jbr_projection published prune --out bench/cost.jsonl

bench-smoke: $(VENV)/.installed
	$(BIN)/python scripts/benchmark.py --config scripts/configs/digits.yaml --protocol budget --criterion jbr taylor l1 \
		random --budgets 0.8 0.6 0.4 --seeds 0 1 --images 128 --out bench-smoke/lines.jsonl
	$(BIN)/python scripts/tables.py bench-smoke/lines.jsonl --area --figure bench-smoke/lines.png

clean:
	rm -rf $(VENV) demo bench bench-smoke build dist *.egg-info
