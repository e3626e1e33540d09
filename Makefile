# Everything happens in .venv; only python3 (with venv) and make are assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo

# Where `make image` builds; a root folder, removed before.
IMAGE_ROOT ?= /tmp/compressor-image

.PHONY: help install demo test acceptance llama-cpp web optimum image lint format docs clean

help:
	@echo "make demo        install, then distill the embedded teacher to half its size (minutes)"
	@echo "make test        install, then run the tests"
	@echo "make acceptance  the demo, held to what it promises (minutes)"
	@echo "make llama-cpp   build llama.cpp, then hold GGUF files to it (minutes)"
	@echo "make web         load an exported folder in headless Chromium with transformers.js"
	@echo "make optimum     load an exported folder with optimum's ORTModelForCausalLM, in an environment of its own"
	@echo "make image       run the Dockerfile's steps and commands in a clean Debian (root, debootstrap; minutes)"
	@echo "make lint        ruff and pyright"

# The pip that comes with venv may not know dependency groups; the constraints pin everything.
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV), a minute or two"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable . --group dev
	@touch $@

install: $(VENV)/installed

demo: install
	$(BIN)/compressor distill --teacher demo --target 50% --out $(RUN)

test: install
	$(BIN)/python -m pytest -n 2 -q

acceptance: install
	$(BIN)/python -m pytest -m slow -q

# llama.cpp for the vector units this processor has; AMX is left out, where its int8 product crashed.
AVX512 := $(shell grep -q avx512_vnni /proc/cpuinfo 2>/dev/null && echo " -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON")
LLAMA_FLAGS := -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON$(AVX512)

$(VENV)/llama-cpp: $(VENV)/installed
	@echo "building llama.cpp, some minutes"
	CMAKE_ARGS="$(LLAMA_FLAGS)" $(BIN)/python -m pip install --quiet --no-cache-dir llama-cpp-python==0.3.36
	@touch $@

llama-cpp: $(VENV)/llama-cpp
	$(BIN)/python -m pytest -q -n 2 tests/test_export.py -k "gguf or k_quants or llama_cpp"

web: install
	$(BIN)/python tests/runtimes/web.py

optimum: install
	$(BIN)/python tests/runtimes/optimum.py

image: install
	rm -rf --one-file-system $(IMAGE_ROOT) $(IMAGE_ROOT)-data
	$(BIN)/python tests/runtimes/image.py $(IMAGE_ROOT)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	$(BIN)/python -c "from compressor.cli import help_page; print(help_page(), end='')" > docs/commands.md
	$(BIN)/python -c "from compressor.recipe import reference_page; print(reference_page(), end='')" > docs/recipe.md

clean:
	rm -rf $(VENV) runs build *.egg-info
