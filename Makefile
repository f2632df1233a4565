# A fresh machine needs only make and a Python >= 3.11 with venv: every target builds .venv first when it is missing or
# out of date. PYTHON=python3.12 picks the interpreter, PIP_ARGS="..." reaches every pip install.

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.14,\
  $(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

# -- make demo: one Hydra multirun, then the table and the figure of what it measured
DEMO_RUNS := multirun/demo/$(shell date +%Y-%m-%d_%H-%M-%S)
DEMO_TRAIN = lrsa-train -m experiment=demo hydra.sweep.dir=$(DEMO_RUNS)
DEMO_TABLE = lrsa-table experiment=demo records=[$(DEMO_RUNS)] output=$(DEMO_RUNS)

# -- make test
PYTEST = $(BIN)/python -m pytest -n 2

# -- make test-matrix
OLD_TRANSFORMERS := 5.2.0
OLD_VENV := .venv-transformers-$(OLD_TRANSFORMERS)
OLD_UNPINNED := transformers|tokenizers|huggingface[_-]hub|hf-xet
MATRIX_TESTS ?= tests/cache tests/attention/test_huggingface.py tests/test_models.py tests/evaluation tests/training

# -- make test-peers
PEERS_VENV := .venv-peers

# -- make bench-generation
BENCH_RUNS := outputs/generation/$(shell date +%Y-%m-%d_%H-%M-%S)
BENCH = lrsa-bench mode=generate device=cuda 'lags=[128]'
SMOLLM2_8K = model=smollm2_random model.dtype=bfloat16 'lengths=[8192]'
LLAMA_8B = model=llama3_8b_random
PEERS = 'engines=[dense,kvpress/LagKVPress]' largest_batch=false

# -- make bundle
PYTHON_VERSION ?= 3.12
PLATFORM ?= manylinux_2_28_x86_64
BUNDLE ?= dist/bundle
HAVE ?=
MODEL ?=
DATA ?=
EXTRAS ?=
SPLIT_MB ?=

.PHONY: help venv demo test test-slow test-matrix test-peers bench-generation bench-cost tables check format notebooks model \
  bundle clean

help:
	@echo 'make demo        post-train a small model with and without LRSA, print the table (CPU, no network needed once installed)'
	@echo 'make test        tests, without the slow ones'
	@echo 'make test-slow   the slow tests alone'
	@echo 'make test-matrix the tests of what touches transformers, on the oldest that is supported, in a second environment'
	@echo 'make test-peers  our rules against kvpress, in an environment of its own'
	@echo 'make bench-generation  speed of generation on a GPU: dense, LRSA, kvpress'
	@echo 'make bench-cost  time and memory of a training step with each rule on a GPU, against dense'
	@echo 'make tables      every table and figure of experiments/ again, from the records'
	@echo 'make check       ruff, mypy, import order'
	@echo 'make format      let ruff rewrite the sources'
	@echo 'make notebooks   run the notebooks (CPU, no network); to open them: pip install -e ".[notebooks]", jupyter lab notebooks'
	@echo 'make model       SmolLM2-135M-Instruct into models/'
	@echo 'make bundle      what a node without a network needs, in one folder:'
	@echo '                 [PYTHON_VERSION=3.12] [PLATFORM=manylinux_2_28_x86_64] [HAVE=pip-list.txt] [EXTRAS=flash4]'
	@echo '                 [MODEL=smollm2] [DATA="folder ..."] [SPLIT_MB=60] [BUNDLE=dist/bundle]'
	@echo 'make venv        .venv alone; PYTHON=python3.12 picks the interpreter'

venv: $(STAMP)

# torch first and alone: it is most of the download, and a failure there should say so.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'error: no Python >= 3.11 found; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"error: Python >= 3.11 is needed, {sys.executable} is {v[0]}.{v[1]}")'
	@test -x $(BIN)/python || { echo '[1/3] creating $(VENV) with $(PYTHON)'; $(PYTHON) -m venv $(VENV) || \
	  { echo 'error: `$(PYTHON) -m venv` failed; on Debian and Ubuntu: apt install python3-venv' >&2; rm -rf $(VENV); exit 1; }; }
	@echo '[2/3] installing torch'
	@$(PIP_INSTALL) torch
	@echo '[3/3] installing lrsa and the rest (about a minute)'
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@

demo: $(STAMP)
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(BIN)/$(DEMO_TRAIN)
	$(BIN)/$(DEMO_TABLE)

test: $(STAMP)
	$(PYTEST) -m 'not slow'

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# The oldest transformers that is supported, in an environment of its own; `make test` runs on the newest.
test-matrix: $(OLD_VENV)/.installed
	$(OLD_VENV)/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	$(OLD_VENV)/bin/python -m pytest -n 2 -m 'not slow' $(MATRIX_TESTS)

$(OLD_VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(OLD_VENV)/bin/python || $(PYTHON) -m venv $(OLD_VENV)
	@grep -v -i -E '^($(OLD_UNPINNED))==' constraints.txt > $(OLD_VENV)/constraints.txt
	@echo 'installing transformers $(OLD_TRANSFORMERS) and the rest into $(OLD_VENV) (some minutes)'
	@$(OLD_VENV)/bin/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c $(OLD_VENV)/constraints.txt torch
	@$(OLD_VENV)/bin/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c $(OLD_VENV)/constraints.txt \
	  -e '.[dev]' 'transformers==$(OLD_TRANSFORMERS)'
	@touch $@

# kvpress, in an environment of its own: it needs transformers < 5.3 and pandas < 3, where pip finds the rest by itself.
test-peers: $(PEERS_VENV)/.installed
	$(PEERS_VENV)/bin/python -m pytest -q tests/attention/test_kvpress.py tests/test_evaluate.py -k kvpress

$(PEERS_VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(PEERS_VENV)/bin/python || $(PYTHON) -m venv $(PEERS_VENV)
	@grep -i '^torch==' constraints.txt > $(PEERS_VENV)/constraints.txt
	@echo 'installing kvpress, lrsa and what they need into $(PEERS_VENV) (some minutes)'
	@$(PEERS_VENV)/bin/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c $(PEERS_VENV)/constraints.txt torch
	@$(PEERS_VENV)/bin/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c $(PEERS_VENV)/constraints.txt \
	  -e '.[dev,peers]'
	@touch $@

# Dense and LRSA in one process, kvpress in another environment; on a GPU, for a quarter of an hour.
bench-generation: $(STAMP) $(PEERS_VENV)/.installed
	$(BIN)/$(BENCH) $(SMOLLM2_8K) 'compressions=[2,4,8]' rounds=3 hydra.run.dir=$(BENCH_RUNS)/smollm2-8k
	$(BIN)/$(BENCH) $(LLAMA_8B) 'lengths=[32768]' 'compressions=[2,4,8]' rounds=2 hydra.run.dir=$(BENCH_RUNS)/llama8b-32k
	$(BIN)/$(BENCH) $(LLAMA_8B) 'lengths=[131072]' 'compressions=[4,2,8]' rounds=1 'backends=[flex]' hydra.run.dir=$(BENCH_RUNS)/llama8b-128k
	$(PEERS_VENV)/bin/$(BENCH) $(PEERS) $(SMOLLM2_8K) 'compressions=[2,4,8]' rounds=3 hydra.run.dir=$(BENCH_RUNS)/kvpress-smollm2-8k
	$(PEERS_VENV)/bin/$(BENCH) $(PEERS) $(LLAMA_8B) 'lengths=[32768]' 'compressions=[2,4,8]' rounds=1 hydra.run.dir=$(BENCH_RUNS)/kvpress-llama8b-32k
	$(PEERS_VENV)/bin/$(BENCH) $(PEERS) $(LLAMA_8B) 'lengths=[131072]' 'compressions=[4]' rounds=1 hydra.run.dir=$(BENCH_RUNS)/kvpress-llama8b-128k
	$(BIN)/lrsa-bench 'records=[$(BENCH_RUNS)]' table=$(BENCH_RUNS)/table.md

# What training with each rule costs, against dense; for its table: experiments/benchmark.
bench-cost: $(STAMP)
	$(BIN)/lrsa-bench mode=step model=smollm2_random device=cuda dtype=bfloat16 'lengths=[4096]' 'lags=[128]' 'compressions=[4]' \
	  'backends=[flex]' 'scorers=[lag_relative,snapkv,h2o,tova]' batch_size=8 rounds=15

tables: $(STAMP)
	$(BIN)/lrsa-table experiment=all

# All four run, whatever the first one says.
check: $(STAMP)
	@status=0; for step in 'ruff check .' 'ruff format --check .' 'mypy' 'python -m pytest -q tests/test_architecture.py'; do \
	  echo "$$step"; $(BIN)/$$step || status=1; done; exit $$status

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# nbclient's command. It writes nothing back: notebooks are stored without outputs.
notebooks: $(STAMP)
	$(BIN)/jupyter-execute notebooks/*.ipynb

model: $(STAMP)
	$(BIN)/python -m lrsa.bundle.smollm2 models/SmolLM2-135M-Instruct

bundle: $(STAMP)
	$(BIN)/python -m lrsa.bundle --python-version '$(PYTHON_VERSION)' --platform '$(PLATFORM)' --output '$(BUNDLE)' \
	  $(if $(HAVE),--have '$(HAVE)') $(if $(EXTRAS),--extras '$(EXTRAS)') $(if $(MODEL),--model '$(MODEL)') \
	  $(if $(DATA),--data $(DATA)) $(if $(SPLIT_MB),--split-mb $(SPLIT_MB))

clean:
	rm -rf $(VENV) $(OLD_VENV) $(PEERS_VENV) dist build .mypy_cache .pytest_cache .ruff_cache
