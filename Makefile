# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test lint schema install-demo install-dev clean

demo: $(VENV)/demo.installed
	$(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml scripts/train.py recipes/gpt2_lora.yaml
	$(BIN)/python scripts/demo.py runs/gpt2_lora

test: $(VENV)/dev.installed
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

schema: $(VENV)/dev.installed
	$(BIN)/toolkit schema > recipes/schema.json

$(VENV)/demo.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/dev.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
