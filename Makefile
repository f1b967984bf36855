# Everything runs in an environment of its own; `make demo` and `make test` need nothing but Python and make.
PYTHON ?= python3
VENV ?= .venv
# On Linux PyPI's torch comes with CUDA; set TORCH to another requirement to choose.
TORCH ?= torch==2.13.0

.PHONY: demo test slow quality bench clean

demo: $(VENV)/ready
	$(VENV)/bin/anee demo

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest -n auto --dist loadfile

slow: $(VENV)/ready
	$(VENV)/bin/python -m pytest -m slow -rP

quality: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/ready
	$(VENV)/bin/anee bench

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet "$(TORCH)"
	$(VENV)/bin/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
