# Everything happens in .venv; only python3 (with venv) and make are assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo

.PHONY: help install demo test acceptance lint format docs clean

help:
	@echo "make demo        install, then distill the embedded teacher to half its size (minutes)"
	@echo "make test        install, then run the tests"
	@echo "make acceptance  the demo, held to what it promises (minutes)"
	@echo "make lint        ruff and pyright"

# The pip that comes with venv may not know dependency groups; the constraints pin everything.
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV), a minute or two"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	@touch $@

install: $(VENV)/installed

demo: install
	$(BIN)/compressor distill --teacher demo --target 50% --out $(RUN)

test: install
	$(BIN)/python -m pytest -n 2 -q

acceptance: install
	$(BIN)/python -m pytest -m slow -q

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
