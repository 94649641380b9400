# One verb a target; all may be repeated, and what is done already is not done twice.
# On a fresh machine they need only Python 3.11 or later with venv (uv is used where it is found).

PYTHON ?= python3
DATA ?= ./perdure-data
ENGINE ?= sqlite
HOST ?= 127.0.0.1
PORT ?= 8420
CYCLES ?= 200
SERVERS ?= 1
SEED ?= 1
SECONDS ?= 120
BUDGET ?= 7200
TESTS ?=
MORE ?=
DEPTH ?= 1
WORKERS ?= 3

BIN := .venv/bin
ifeq ($(shell uv --version >/dev/null 2>&1 && echo yes),yes)
INSTALL := uv pip install --quiet --python $(BIN)/python
else
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
endif
COMPILE := uv pip compile --quiet --universal --generate-hashes --no-annotate \
	--custom-compile-command "make lock" pyproject.toml

.PHONY: serve demo recording test campaigns surfaces judges lint format bench torture proof \
	fuzz crash evidence nightly docs lock wheel

# ENGINE=postgres serves from a PostgreSQL of its own, which comes from a package with the other
# tools of development. Any other is named to `perdure serve --engine`.
ifeq ($(ENGINE),postgres)
serve: .venv/.dev
	exec $(BIN)/python -m perdure.proving.postgres $(DATA)-postgres \
		$(BIN)/perdure serve --data $(DATA)-postgres/files --host $(HOST) --port $(PORT)
else
serve: .venv/.runtime  ## serve on 127.0.0.1:8420, keeping everything under ./perdure-data
	exec $(BIN)/perdure serve --data $(DATA) --host $(HOST) --port $(PORT)
endif

demo: .venv/.runtime  ## kill a server in mid-sentence and read the sentence to its end
	exec $(BIN)/perdure demo

# DEPTH=20 has schemathesis try twenty times as many examples. Tests wait for processes and disks:
# three at a time pay even on two cores. A file stays with one worker: what its tests share is made
# once. MORE are further options of pytest.
PYTEST = SCHEMATHESIS_EXAMPLES=$(DEPTH) \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(MORE)

test: .venv/.dev  ## everything that needs no browser and no network; TESTS=path runs a part
	$(PYTEST) $(or $(TESTS),tests --ignore=tests/crash --ignore=tests/proving)

campaigns: .venv/.dev  ## the crash tests, and the tests that every proof can fail
	$(PYTEST) tests/crash tests/proving

surfaces: .venv/.dev  ## the tests of services and of HTTP once more, on PostgreSQL
	SURFACES_ON=postgres $(PYTEST) tests/services tests/frontends

judges: .venv/.dev  ## the official SDK for Node against a real server; fetches it from npm
	$(BIN)/python -m pytest tests/e2e/node/openai_node.py

lint: .venv/.dev  ## style, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev  ## what `lint` can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.dev  ## measure against raw SQLite and peers, in one run
	$(BIN)/python -m bench --write docs/performance.md

torture: .venv/.dev  ## every fault this machine can make, in SECONDS, chosen by SEED
	$(BIN)/perdure torture --seconds $(SECONDS) --seed $(SEED)

proof: .venv/.dev  ## the same by count instead of time: the cases that every change must pass
	$(BIN)/perdure torture --counted --seconds 1500 --seed $(SEED)

fuzz: .venv/.dev  ## SECONDS of hostile bytes for each reader of what others wrote
	$(BIN)/python -m perdure.proving.fuzz --seconds $(SECONDS) --seed $(SEED)

crash: .venv/.dev  ## CYCLES kills of a real server, or of SERVERS=2 on PostgreSQL, and the verdict
	$(BIN)/python -m perdure.proving.crash --cycles $(CYCLES) --seed $(SEED) \
		--servers $(SERVERS)

evidence: .venv/.dev  ## torture, crash campaign and planted bugs in SECONDS, and their page
	$(BIN)/python -m docs.evidence --seconds $(SECONDS) --seed $(SEED)

nightly: .venv/.dev  ## the same with a BUDGET of many seconds
	$(BIN)/python -m docs.evidence --seconds $(BUDGET) --seed $(SEED)

recording: .venv/.dev  ## run the demo and put what it prints on the README's first screen
	$(BIN)/python -m docs.recording

docs: .venv/.dev  ## join statements, promises and test marks into docs/guarantees.md
	$(BIN)/python -m docs.guarantees

lock:  ## resolve pyproject.toml anew into both lock files (needs uv)
	$(COMPILE) --upgrade --group dev --output-file requirements-dev.lock
	$(COMPILE) --upgrade --constraints requirements-dev.lock --output-file requirements.lock

wheel: .venv/.dev  ## build dist/perdure-*.whl with the locked build backend
	$(BIN)/python -m hatchling build -t wheel

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Perdure needs Python 3.11 or later; set PYTHON=/path/to/one."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.runtime: requirements.lock pyproject.toml | .venv/bin/python
	$(INSTALL) --require-hashes -r requirements.lock
	$(INSTALL) --no-deps -e .
	@touch $@

# The two locks agree on every version they share, so this one stands in for both.
.venv/.dev: requirements-dev.lock pyproject.toml | .venv/bin/python
	$(INSTALL) --require-hashes -r requirements-dev.lock
	$(INSTALL) --no-deps -e .
	@touch $@ .venv/.runtime
