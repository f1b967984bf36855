"""A token alone under `plan`, in plain numbers: what is decided, spent and computed is that of the general way."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_anee.static_runner import Listed, StaticRunner

from .tiny import BRIDGES, LAYERS, tiny_base, token_ids, wrap


PLANS = {
    "skips": [],
    "precisions": [f"{LAYERS}*INT8 / int8", f"{LAYERS}*INT4 / int4", "INT8, INT4_SKIP_FFN, SKIP_INT4, INT4 / int8"],
    "exits": ["PROCESS, SKIP, 2*EXIT", "3*PROCESS, EXIT"],
}


def model_of(plans: str, mode: str = "average"):
    precisions = ["int8", "int4"] if plans == "precisions" else []
    return wrap(tiny_base(), controller="plan", plans=PLANS[plans] or None, precisions=precisions, budget_mode=mode, **BRIDGES)


@torch.no_grad()
def decoded(model, ids, budgets):
    """Logits and traces of one token after the other."""
    cache, steps = model(ids[:, :1], energy_budget=budgets[0]).past_key_values, []
    for part, budget in zip(ids[:, 1:].split(1, dim=1), budgets[1:], strict=True):
        steps.append(model(part, energy_budget=budget, past_key_values=cache))
    return steps


@pytest.mark.parametrize("mode", ["average", "strict"])
@pytest.mark.parametrize("plans", PLANS)
def test_it_does_what_the_general_way_does(plans, mode, monkeypatch):
    model, ids = model_of(plans, mode), token_ids(1, 12)
    budgets = [1.0, *(1.0, 0.9, 0.73, 0.5, 0.41, 0.3, 0.2, 0.1, 0.0, 0.62, 0.97)]
    quick = decoded(model, ids, budgets)
    monkeypatch.setattr(StaticRunner, "takes", lambda *_: False)
    for one, other in zip(quick, decoded(model, ids, budgets), strict=True):
        torch.testing.assert_close(one.logits, other.logits, atol=0, rtol=0)
        assert torch.equal(one.execution.actions, other.execution.actions)
        assert torch.equal(one.execution.cost, other.execution.cost)
        assert (one.execution.head is None) == (other.execution.head is None)
        assert one.execution.head is None or torch.equal(one.execution.head, other.execution.head)


@cache
def known_model(mode):
    return model_of("precisions", mode)


@settings(max_examples=200, deadline=None)
@given(budget=st.floats(0, 1), index=st.integers(0, 10000), mode=st.sampled_from(["average", "strict"]))
def test_a_plan_is_looked_up_as_the_table_does(budget, index, mode):
    model = known_model(mode)
    listed = Listed.of(model.controller, model.executor.layers)
    table = model.controller.table
    expected = table.places(torch.tensor([budget], dtype=torch.float64), torch.tensor([index]))
    assert listed.place(budget, index) == expected.item()


@torch.no_grad()
def test_a_controller_that_was_bound_anew_is_followed(monkeypatch):
    model, ids = model_of("precisions"), token_ids(1, 4)
    decoded(model, ids, [1.0, 0.5, 0.5, 0.5])
    model._bind()
    fresh = decoded(model, ids, [1.0, 0.5, 0.5, 0.5])
    monkeypatch.setattr(StaticRunner, "run", None)
    with pytest.raises(TypeError):  # it is used
        decoded(model, ids, [1.0, 0.5, 0.5, 0.5])
    assert fresh[-1].execution.cost < 1.0
