"""Messages go through transformers' logger, with its verbosity, and repeat neither per token nor per forward."""

import ast
from pathlib import Path

import pytest
from transformers.utils import logging

import modeling_anee

from .tiny import BRIDGES, token_ids, wrap


SHIPPED = sorted(Path(modeling_anee.__file__).parent.glob("*.py"))
LONG = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}


def test_a_budget_that_cannot_be_reached_is_said_once(said):
    model = wrap(**BRIDGES)
    floor = model.controller.floor
    assert 0.1 < floor < 0.9
    for _ in range(2):
        output = model.generate(token_ids(), energy_budget=[0.1, 0.9], return_dict_in_generate=True, **LONG)
    assert len(said) == 1 and "energy_budget=0.1 is below" in said[0] and f"about {floor:.3g}" in said[0]
    assert abs(float(output.execution.cost[0, 1:].mean()) - floor) < 1e-6
    model.generate(token_ids(), energy_budget=0.05, num_beams=2, max_new_tokens=20)
    assert len([message for message in said if "is below what" in message]) == 2  # another budget


def test_a_budget_that_can_be_reached_needs_no_words(said):
    model = wrap()
    for budget in (1.0, model.controller.floor):
        model.generate(token_ids(), energy_budget=budget, **LONG)
    assert said == []


def test_the_verbosity_of_transformers_is_ours(said):
    before = logging.get_verbosity()
    try:
        logging.set_verbosity_error()
        wrap().generate(token_ids(), energy_budget=0.0, **LONG)
        assert said == []
        logging.set_verbosity_warning()
        logging.warning_once.cache_clear()
        wrap().generate(token_ids(), energy_budget=0.0, **LONG)
        assert len(said) == 1
    finally:
        logging.set_verbosity(before)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_files_neither_print_nor_warn_otherwise(file):
    calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    names = [ast.unparse(call) for call in calls]
    assert not {"print", "warnings.warn", "logging.getLogger"} & set(names)
    assert "get_logger(__name__)" not in file.read_text()  # that is no logger of transformers
