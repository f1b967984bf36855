"""`capacity` beside `energy_budget`: the same dial, by another number."""

import functools

import pytest
import torch
from transformers import GenerationConfig

from modeling_anee import AneeForCausalLM
from modeling_anee.capacity import budgets_of

from .tiny import BRIDGES, calibration_of_gates, tiny_base, token_ids, wrap


MODE = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
ALLOWED = "every value must be between 0.1 and 1"


@functools.cache
def gated(**fields) -> AneeForCausalLM:
    model = wrap(tiny_base(), "gated", exit_layers=(2,), **BRIDGES, **fields)
    model.config.calibration = calibration_of_gates(model.config) | {"settings": [0.2, 0.9]}
    model.controller.bind(model.costs)
    return model


def same(one, other):
    assert torch.equal(one.execution.actions, other.execution.actions)
    assert torch.equal(one.execution.cost, other.execution.cost)


@torch.no_grad()
def test_a_capacity_is_the_budget_of_its_calibration():
    model, ids = gated(), token_ids()
    for capacity, budget in ((0.2, 0.3), (0.55, 0.6), (0.9, 0.9), (0.95, 0.9), (1.0, 1.0)):
        same(model(ids, capacity=capacity), model(ids, energy_budget=budget))
    same(model(ids, capacity=[0.55, 1.0]), model(ids, energy_budget=[0.6, 1.0]))
    tokens = torch.linspace(0.2, 0.9, ids.numel()).view_as(ids)
    same(model(ids, capacity=tokens), model(ids, energy_budget=0.3 + 0.6 * (tokens.double() - 0.2) / 0.7))


@torch.no_grad()
def test_what_was_realised_is_counted_from_the_trace():
    model = gated()
    trace = model(token_ids(), capacity=0.5).execution
    ran = torch.tensor([action.feed_forward == "full" for action in model.config.table])
    assert trace.capacity == pytest.approx(float(ran[trace.actions.long()].float().mean()))
    assert 0.0 < trace.capacity < 1.0 and model(token_ids(), capacity=1.0).execution.capacity == 1.0
    two = gated(precisions=("int8", "int4"), gated_variants=("int8", "int4"))
    trace = two(token_ids(), energy_budget=0.1).execution  # int4 counts as left out
    names = torch.tensor([action.feed_forward == "int8" for action in two.config.table])
    assert trace.capacity == pytest.approx(float(names[trace.actions.long()].float().mean())) and trace.capacity < 1.0
    controller = gated(precisions=("int8", "int4"), gated_variants=("full", "int8", "int4", "none")).controller
    full, int8, int4, none = controller.counts_as  # by what they cost
    assert (full, none) == (1.0, 0.0) and full > int8 > int4 > none
    assert f"capacity {trace.capacity:.2f}" in trace.summary() and "capacity" not in wrap()(token_ids()).execution.summary()
    assert trace.keep(torch.zeros_like(trace.valid)).capacity == 1.0


@torch.no_grad()
def test_the_first_place_that_says_either_decides(tmp_path):
    model, ids = gated(), token_ids(1)

    def found(**kwargs):
        return model.generate(ids, **MODE, **kwargs)

    same(found(capacity=0.55), found(energy_budget=0.6))
    assert torch.equal(found(capacity=[0.55]).sequences, found(energy_budget=0.6).sequences)
    given = GenerationConfig(capacity=0.2, **MODE)
    try:
        model.generation_config.energy_budget = 0.9
        same(found(capacity=0.55), found(energy_budget=0.6))
        same(model.generate(ids, generation_config=given), found(energy_budget=0.3))
        same(model.generate(ids, generation_config=given, energy_budget=0.6), found(energy_budget=0.6))
        model.generation_config.energy_budget = None
        model.generation_config.capacity = 0.55
        same(found(), found(energy_budget=0.6))
        same(model.generate(ids, generation_config=GenerationConfig(energy_budget=0.3, **MODE)), found(energy_budget=0.3))
        model.generation_config.save_pretrained(tmp_path)
        assert GenerationConfig.from_pretrained(tmp_path).capacity == 0.55
    finally:
        model.generation_config.energy_budget = model.generation_config.capacity = None


@torch.no_grad()
def test_both_at_once_or_another_kind_or_value_is_refused():
    model, ids = gated(), token_ids()
    for call in (model, lambda ids, **kwargs: model.generate(ids, **MODE, **kwargs)):
        with pytest.raises(ValueError, match="capacity=0.5 and energy_budget=0.6 say the same in two ways: only one"):
            call(ids, capacity=0.5, energy_budget=0.6)
        for value in (0.05, 1.5, -1.0, [0.5, 0.01], float("nan")):
            with pytest.raises(ValueError, match=f"capacity=.*{ALLOWED}|capacity=.*must be a number between 0.1 and 1"):
                call(ids, capacity=value)
        with pytest.raises(ValueError, match="capacity of shape"):
            call(ids, capacity=[0.5, 0.5, 0.5])
    plan = wrap()
    for call in (plan, lambda ids, **kwargs: plan.generate(ids, **MODE, **kwargs)):
        with pytest.raises(ValueError, match="capacity=0.5 is not possible with controller='plan': only 'gated'"):
            call(ids, capacity=0.5)


@torch.no_grad()
def test_what_no_calibration_knows_is_told(caplog):
    untrained, ids = AneeForCausalLM.from_base(tiny_base(), controller="gated"), token_ids()
    caplog.set_level("WARNING", "transformers.anee")
    assert untrained(ids, capacity=0.31).execution.capacity == 1.0
    assert budgets_of(gated().controller, "gated", 0.11, 1).tolist() == [0.3]
    messages = [record.message for record in caplog.records]
    assert any("capacity=0.31 leaves nothing out" in message for message in messages)
    assert any("capacity=0.11 is below what was calibrated: the lowest, 0.2" in message for message in messages)
