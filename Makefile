# The virtual environment .venv is made on first use. Each target adds the extras that it needs to it.
PYTHON ?= python3
# make INSTALLER=pip does without uv.
INSTALLER ?= uv
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
BUF ?= $(shell command -v buf || echo $$(go env GOPATH)/bin/buf)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two installers must not write to one environment at the same time.
.NOTPARALLEL:
.PHONY: help setup demo test test-fast fuzz check lint-protos protos bench-hm bench-shops bench-amazon bench-baselines bench-index bench-embedding bench-serving bench-quick

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# What a set of targets needs, as extras of pyproject.toml.
EXTRAS_demo := embedding,ranking,training
EXTRAS_protos := dev
EXTRAS_check := $(EXTRAS_demo),xlsx,int8,dev
EXTRAS_bench := $(EXTRAS_demo),bench
EXTRAS_test := $(EXTRAS_demo),xlsx,int8,milvus,postgres,dev

$(STAMPS)/installer:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Vitrine needs Python 3.11 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@[ $(INSTALLER) = pip ] || $(BIN)/python -m pip install --quiet uv --constraint constraints.txt \
	  || echo "uv cannot be installed here: pip installs the packages, which takes longer."
	@mkdir -p $(STAMPS) && touch $@

# $(call install,PYTHON,ARGUMENTS) installs packages for that Python: with uv, or with pip where there is no uv.
# uv ignores pip's settings: pass_on UV_VARIABLE PIP_KEY sets a variable to what pip's environment or its files say,
# unless the variable is set already. UV_SYSTEM_PYTHON would make uv pass over virtual environments.
# uv compiles no bytecode, Python does at the first import. Where Python may not write it, every process would compile
# torch again, so uv compiles it there.
define install
@if [ $(INSTALLER) = uv ] && [ -x $(BIN)/uv ]; then \
  settings=$$($(1) -m pip config list 2>/dev/null | sed 's/default-timeout/timeout/'); \
  pass_on() { \
    [ -z "$$(printenv $$1)" ] || return 0; \
    for section in :env: install global; do \
      value=$$(echo "$$settings" | sed -n "s/^$$section\.$$2='\(.*\)'$$/\1/p" | sed 's/\\n/ /g; s/^ *//'); \
      [ -z "$$value" ] || { export "$$1=$$value"; return; }; \
    done; }; \
  [ -n "$$UV_INDEX_URL" ] || pass_on UV_DEFAULT_INDEX index-url; \
  [ -n "$$UV_EXTRA_INDEX_URL" ] || pass_on UV_INDEX extra-index-url; \
  pass_on UV_HTTP_TIMEOUT timeout; \
  pass_on SSL_CERT_FILE cert; \
  unset UV_SYSTEM_PYTHON; \
  $(BIN)/uv pip install --python $(1) $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode) $(2); \
else \
  $(1) -m pip install --quiet $(2); \
fi
endef

$(STAMPS)/%: pyproject.toml constraints.txt | $(STAMPS)/installer
	$(call install,$(BIN)/python,--editable '.[$(EXTRAS_$*)]' --constraint constraints.txt)
	@touch $@

setup: $(STAMPS)/test ## make .venv with everything that development needs

demo: $(STAMPS)/demo ## draw a shop, train on it, serve it, and write a page with its recommendations
	$(BIN)/python -m demo

test: $(STAMPS)/test ## run all tests
	$(BIN)/python -m pytest

test-fast: $(STAMPS)/test ## run the unit tests but the slow ones: no process, no socket
	$(BIN)/python -m pytest tests/unit -m "not slow"

MESSAGES ?= 20000
SEED ?= 0
fuzz: $(STAMPS)/check ## send malformed requests to a real server; INTERNAL and UNKNOWN are failures
	$(BIN)/python -m tests.fuzz --messages $(MESSAGES) --seed $(SEED)

lint-protos: $(STAMPS)/protos ## lint the protos with buf
	PYTHON=$(CURDIR)/$(BIN)/python protos/generate.sh $(CURDIR)/build/protos
	$(BUF) lint build/protos/vitrine.binpb --config protos/buf.yaml

check: $(STAMPS)/check lint-protos ## run ruff, mypy, import-linter and buf, and compare the stubs with the protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	diff -r -x '*.binpb' -x __pycache__ build/protos/vitrine protos/gen/vitrine
	diff build/protos/api.md docs/api.md

protos: $(STAMPS)/protos ## regenerate the stubs and docs/api.md after a change to protos/vitrine
	PYTHON=$(CURDIR)/$(BIN)/python protos/generate.sh
	mv protos/gen/api.md docs/api.md

bench-hm: $(STAMPS)/demo ## train on the H&M data and score the validation queries
	$(BIN)/python -m bench.hm --split val

bench-shops: $(STAMPS)/bench ## train small, slow and new shops with defaults, next to simple methods
	$(BIN)/python -m bench.shops $(ARGS)

bench-amazon: $(STAMPS)/demo ## the same on four published splits of Amazon reviews
	for name in sports_lattice baby_diffmm p5_beauty p5_sports; do \
	  $(BIN)/python -m bench.amazon $$name --split val || exit 1; done

# Other libraries pin an older NumPy: they live in an environment of their own.
BASELINES := build/baselines
MINUTES ?= 5
PATIENCE ?= 10
$(BASELINES)/ready: bench/baselines/requirements.txt | $(STAMPS)/installer
	$(PYTHON) -m venv $(BASELINES)/venv
	$(call install,$(BASELINES)/venv/bin/python,--requirement bench/baselines/requirements.txt)
	@touch $@

bench-baselines: $(STAMPS)/demo $(BASELINES)/ready ## compare with RecTools and implicit on the same queries
	$(BIN)/python -m bench.baselines --python $(BASELINES)/venv/bin/python --out $(BASELINES) --minutes $(MINUTES) --patience $(PATIENCE)

bench-index: $(STAMPS)/bench ## compare search with plain FAISS, hnswlib and usearch
	$(BIN)/python -m bench.index

SERVERS := build/embedding-servers
$(SERVERS)/%/ready: bench/embedding/%.txt | $(STAMPS)/installer
	$(PYTHON) -m venv $(SERVERS)/$*
	$(call install,$(SERVERS)/$*/bin/python,--requirement $<)
	@touch $@

bench-embedding: $(STAMPS)/demo $(SERVERS)/sentence-transformers/ready $(SERVERS)/infinity/ready ## compare encoding with the plain models and other servers
	$(BIN)/python -m bench.embedding --others $(SERVERS)

# A recommender to compare with, in an environment of its own: it is installed if ARGS asks for it.
PEERS := build/peers
$(PEERS)/%/ready: bench/serving/%.txt | $(STAMPS)/installer
	$(PYTHON) -m venv $(PEERS)/$*
	$(call install,$(PEERS)/$*/bin/python,--requirement $<)
	@touch $@

bench-serving: $(STAMPS)/demo $(if $(findstring --peer,$(ARGS)),$(PEERS)/cornac/ready) ## load the running services at three catalog sizes (ARGS="--sizes 10000"; docs/performance.md)
	$(BIN)/python -m bench.serving $(ARGS)

bench-quick: $(STAMPS)/demo ## compare the CPU time of a page with bench/serving/quick.json (UPDATE=1 rewrites it)
	$(BIN)/python -m bench.serving.quick $(if $(UPDATE),--update)
