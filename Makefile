# Two commands on a fresh machine with Python >= 3.10: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-gpu lint docs mutate chaos clean

demo: $(VENV)/.installed
	$(BIN)/nnUNetv2_semicml_demo --out demo_output

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

# What only a GPU can show, of every method; where there is none, all of it is skipped.
test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -n 0 -m cuda tests/test_cuda.py

# Break the code on purpose and see whether tests notice: hours, and it goes on where it was interrupted. PARTS="losses"
mutate: $(VENV)/.installed
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[mutate]'
	$(BIN)/python benchmarks/mutation.py $(PARTS)

# Kill trainings at random moments, fill disks, start everything twice: half an hour, and it goes on where it ended.
chaos: $(VENV)/.installed
	$(BIN)/python tests/chaos/chaos.py --work $${TMPDIR:-/tmp}/semicml_chaos

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The page of commands, the tables of hyper-parameters, and the documentation as a site: open site/index.html
docs: $(VENV)/.installed
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[docs]'
	$(BIN)/python docs/commands.py
	$(BIN)/python docs/hyper_parameters.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo_output build mutants site *.egg-info
