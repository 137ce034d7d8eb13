# Everything runs inside .venv, which is made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUF ?= $(shell command -v buf || echo $$(go env GOPATH)/bin/buf)

.PHONY: demo test check protos bench-hm bench-amazon bench-rivals bench-index bench-embedding
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[embedding,ranking,training,int8,milvus,postgres,dev]' --constraint constraints.txt
	touch $@

demo: $(VENV)/ready
	$(BIN)/python -m demo

test: $(VENV)/ready
	$(BIN)/python -m pytest

protos: $(VENV)/ready
	PYTHON=$(CURDIR)/$(BIN)/python protos/generate.sh
	mv protos/gen/api.md docs/api.md

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	PYTHON=$(CURDIR)/$(BIN)/python protos/generate.sh $(CURDIR)/build/protos
	$(BUF) lint build/protos/vitrine.binpb --config protos/buf.yaml
	diff -r -x '*.binpb' -x __pycache__ build/protos/vitrine protos/gen/vitrine
	diff build/protos/api.md docs/api.md

bench-hm: $(VENV)/ready
	$(BIN)/python -m bench.hm --split val

bench-amazon: $(VENV)/ready
	for name in sports_lattice baby_diffmm p5_beauty p5_sports; do \
	  $(BIN)/python -m bench.amazon $$name --split val || exit 1; done

# Other libraries pin an older NumPy: they live in an environment of their own.
RIVALS := build/rivals
MINUTES ?= 5
PATIENCE ?= 10
$(RIVALS)/ready: bench/rivals/requirements.txt
	$(PYTHON) -m venv $(RIVALS)/venv
	$(RIVALS)/venv/bin/python -m pip install --quiet --requirement bench/rivals/requirements.txt
	touch $@

bench-rivals: $(VENV)/ready $(RIVALS)/ready
	$(BIN)/python -m bench.rivals --python $(RIVALS)/venv/bin/python --out $(RIVALS) --minutes $(MINUTES) --patience $(PATIENCE)

bench-index: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --editable '.[bench]' --constraint constraints.txt
	$(BIN)/python -m bench.index

SERVERS := build/embedding-rivals
$(SERVERS)/%/ready: bench/embedding/%.txt
	$(PYTHON) -m venv $(SERVERS)/$*
	$(SERVERS)/$*/bin/python -m pip install --quiet --requirement $<
	touch $@

bench-embedding: $(VENV)/ready $(SERVERS)/sentence-transformers/ready $(SERVERS)/infinity/ready
	$(BIN)/python -m bench.embedding --others $(SERVERS)
