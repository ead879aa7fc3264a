# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test lint bench memory methods soak schema install-demo install-dev clean

demo: $(VENV)/demo.installed
	$(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml scripts/train.py recipes/gpt2_lora.yaml
	$(BIN)/python scripts/demo.py runs/gpt2_lora

test: $(VENV)/dev.installed
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two hours on two cores with nothing else running, most of them the peer's.
bench: $(VENV)/dev.installed
	$(BIN)/python benchmarks/training_speed.py --rounds 2
	$(BIN)/python benchmarks/prediction_speed.py --texts 10000 --rounds 1
	$(BIN)/python benchmarks/growth.py --rows 1000 250000 500000 1000000 2000000
	$(BIN)/python benchmarks/tokenizing.py
	$(BIN)/python benchmarks/merging.py --size small --rounds 3
	$(BIN)/python benchmarks/merging.py --size xl --rounds 3 --in-memory
	$(BIN)/python benchmarks/table.py performance

# About an hour on two cores with nothing else running, and 16 GiB of memory for the peer and the XL base.
memory: $(VENV)/dev.installed
	$(BIN)/python benchmarks/memory_plan.py
	$(BIN)/python benchmarks/allocator.py
	$(BIN)/python benchmarks/merging.py --size xl --last-block
	$(BIN)/python benchmarks/table.py memory

# Two hours and more on two cores; rows that are in benchmarks/results/methods.json are not measured again. DATA is a folder
# of sms_spam.tsv and emotion_{train,val,test}.tsv, ENCODER that of a DistilBERT; without them the embedded bases and the
# named set serve.
methods: $(VENV)/dev.installed
	$(BIN)/python benchmarks/methods.py $(if $(DATA),--data $(DATA)) $(if $(ENCODER),--encoder $(ENCODER))
	$(BIN)/python benchmarks/table.py methods

# Every promise in its full number, and the peer on the same cases: some 40 minutes of processor time.
soak: $(VENV)/dev.installed
	$(BIN)/python benchmarks/reliability.py

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
