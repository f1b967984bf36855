# `make demo` and `make test` need nothing but Python and make. They install what constraints.txt says, whatever was released since.
PYTHON ?= python3
VENV ?= .venv
# Any torch since 2.7 goes with the locked set. PyPI's brings CUDA along on Linux; set TORCH to another requirement to choose.
TORCH ?= torch==2.13.0
# The oldest transformers that is supported. `make newest` takes the newest that there is.
OLDEST = 5.23.0
# Tests of what transformers has no part in, left out by `make oldest` and `make newest`.
ELSEWHERE = actions allotment base_kernels budget_curve calibration card children comparison controls costs depth documents energy files guard heatmap \
	hub_scripts import_order lock names packaging page perplexity_verb progress recipe refit report routing run samples \
	secret_files signals stages start state templates text texts trace windows yaml_file

TEST = bin/python -m pytest -n auto --dist loadfile

.PHONY: demo test newest oldest slow quality bench lock clean

demo: $(VENV)/ready
	$(VENV)/bin/anee demo

test: $(VENV)/ready
	$(VENV)/$(TEST)

newest: $(VENV)-newest/ready
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade transformers
	$(VENV)-newest/$(TEST) $(ELSEWHERE:%=--ignore tests/test_%.py)

oldest: $(VENV)-oldest/ready
	$(VENV)-oldest/bin/python -m pip install --quiet "transformers==$(OLDEST)"
	$(VENV)-oldest/$(TEST) $(ELSEWHERE:%=--ignore tests/test_%.py)

slow: $(VENV)/ready
	$(VENV)/bin/python -m pytest -m slow -rP

quality: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Threads that wait for work sleep after a millisecond: in a virtual machine the time that they spin is taken from the others.
bench: export GOMP_SPINCOUNT ?= 20000
bench: $(VENV)/ready
	$(VENV)/bin/anee bench --repeats 5

%/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --constraint constraints.txt pip setuptools
	$*/bin/python -m pip install --quiet --constraint constraints.txt "$(TORCH)"
	PYTHONWARNINGS=ignore $*/bin/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@

# torch and the CUDA that its version names are left out: TORCH chooses them.
lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet uv==0.13.9
	echo "$(TORCH)" | $(VENV)-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --no-annotate \
		--custom-compile-command "make lock" --extra dev --output-file $(VENV)-lock/constraints.txt --upgrade pyproject.toml -
	grep -vE "^(torch|triton|cuda-.*|nvidia-[^m].*)==" $(VENV)-lock/constraints.txt > constraints.txt

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest $(VENV)-lock build dist *.egg-info
