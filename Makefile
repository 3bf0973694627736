# make demo and make test do all the set-up, in a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.shardckpt-stamp
SOURCES := pyproject.toml constraints.txt $(shell find csrc -name '*.cc' -o -name '*.h' -o -name '*.cmake' -o -name CMakeLists.txt)
# TORCH= may ask for another torch than the tested one; everything else stays pinned.
PINS := $(VENV)/constraints.txt

.PHONY: setup demo demo-jax demo-cross test test-all bench bench-peers lint core-test core-test-arm clean

setup: $(STAMP)

$(STAMP): $(SOURCES)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $(PINS)
	$(BIN)/python -m pip install --quiet --upgrade -c $(PINS) pip scikit-build-core nanobind cmake ninja
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet -c $(PINS) '$(TORCH)'
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet -c $(PINS) --no-build-isolation -e '.[torch,jax,dev]'
	touch $(STAMP)

demo-jax: setup
	$(BIN)/python examples/jax_pjit/demo.py

demo-cross: setup
	$(BIN)/python examples/cross/demo.py

demo: setup
	$(BIN)/python examples/torch_fsdp/demo.py

test: setup
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile -q

test-all: setup
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -n 2 --dist loadfile -q

bench: setup
	for script in limits overhead_vs_frequency stall durable save_load many_small memory reshard jax_peers \
	  policy scale many_ranks; do \
	  $(BIN)/python benchmarks/$$script.py --json benchmarks/results/$$script.json || exit 1; \
	done
	$(BIN)/python benchmarks/report.py

# Beside what else there is, in an environment of its own. ByteCheckpoint asks for an older torch, so
# it comes without what it asks for; peers.md says whether it ran.
PEERS := build/peers
PEER_PINS := torchsnapshot==0.1.0 importlib-metadata==8.7.0 setuptools==80.9.0
BYTECHECKPOINT := bytecheckpoint==0.0.2 mmh3==4.1.0 universal-pathlib==0.2.6 cachetools==5.5.2 grpcio==1.69.0

bench-peers: $(PEERS)/.stamp
	$(PEERS)/bin/python benchmarks/peers.py --json benchmarks/results/peers.json

$(PEERS)/.stamp: $(SOURCES)
	mkdir -p build
	test -x $(PEERS)/bin/pip || $(PYTHON) -m venv $(PEERS)
	grep -v '^torch==' constraints.txt > $(PEERS)/constraints.txt
	$(PEERS)/bin/python -m pip install --quiet --upgrade -c $(PEERS)/constraints.txt pip scikit-build-core nanobind cmake ninja
	$(PEERS)/bin/python -c 'import torch' 2>/dev/null || $(PEERS)/bin/python -m pip install --quiet '$(TORCH)'
	PATH="$(abspath $(PEERS)/bin):$$PATH" $(PEERS)/bin/python -m pip install --quiet -c $(PEERS)/constraints.txt --no-build-isolation '.[torch,jax]'
	$(PEERS)/bin/python -m pip install --quiet -c $(PEERS)/constraints.txt safetensors orbax-checkpoint tensorstore optax grain matplotlib
	$(PEERS)/bin/python -m pip install --quiet -c $(PEERS)/constraints.txt $(PEER_PINS) || echo 'torchsnapshot does not install here'
	$(PEERS)/bin/python -m pip install --quiet --no-deps $(BYTECHECKPOINT) || echo 'ByteCheckpoint does not install here'
	touch $@

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cc' -o -name '*.h')
	$(BIN)/mypy
	$(BIN)/lint-imports

core-test: setup
	mkdir -p build
	for sanitizer in address,undefined thread; do \
	  build=build/core-$$sanitizer; \
	  $(BIN)/cmake -S csrc -B $$build -DSHARDCKPT_PYTHON=OFF -DSHARDCKPT_TESTS=ON \
	    -DSHARDCKPT_SANITIZE=$$sanitizer -DCMAKE_BUILD_TYPE=RelWithDebInfo > $$build.log 2>&1 \
	  && $(BIN)/cmake --build $$build -j 2 >> $$build.log 2>&1 \
	  && $(BIN)/ctest --test-dir $$build --output-on-failure || { cat $$build.log; exit 1; }; \
	done

# The paths for ARM, on a machine that has them only in an emulator.
core-test-arm: setup
	mkdir -p build
	build=build/core-arm; \
	$(BIN)/cmake -S csrc -B $$build -DSHARDCKPT_PYTHON=OFF -DSHARDCKPT_TESTS=ON \
	  -DCMAKE_TOOLCHAIN_FILE=aarch64.cmake > $$build.log 2>&1 \
	&& $(BIN)/cmake --build $$build -j 2 >> $$build.log 2>&1 \
	&& $(BIN)/ctest --test-dir $$build --output-on-failure || { cat $$build.log; exit 1; }

clean:
	rm -rf build .venv .mypy_cache .ruff_cache .pytest_cache demo-output
