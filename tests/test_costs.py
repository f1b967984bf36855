"""Costs add up, and are the work that really runs, as torch counts it."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from modeling_anee.actions import DEFAULT_TABLE, EXIT, PROCESS, SKIP
from modeling_anee.base_model import BaseStack
from modeling_anee.configuration_prices import COUNTED
from modeling_anee.controller import Observation
from modeling_anee.costs import CostTable, LayerWork
from modeling_anee.hardware import HARDWARE
from modeling_anee.work import work_of

from .tiny import FAMILIES, LAYERS, tiny_base, token_ids, wrap


LINEAR_MAPS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)


def measured(function, *args, **kwargs) -> int:
    """FLOPs of the linear maps that a call runs; attention scores are left out."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if operation in LINEAR_MAPS)


def inputs(stack: BaseStack, tokens: int = 5):
    torch.manual_seed(0)
    hidden = torch.randn(2, tokens, stack.config.hidden_size)
    return hidden, stack.rotation(hidden, torch.arange(tokens).unsqueeze(0))


@pytest.mark.parametrize("unit", COUNTED)
@pytest.mark.parametrize("family", FAMILIES)
def test_processing_everything_costs_one(family, unit):
    costs = BaseStack(tiny_base(family).requires_grad_(False)).measure_costs(unit)
    assert float(costs.layers[:, PROCESS].sum()) + costs.head == pytest.approx(1.0, abs=1e-12)
    assert costs.layers.shape == (LAYERS, len(DEFAULT_TABLE)) and costs.layers.dtype == torch.float64
    assert (costs.layers > 0).all() and costs.unit == unit
    assert (costs.layers[:, SKIP] < costs.layers[:, PROCESS]).all()
    assert torch.equal(costs.layers[:, SKIP], costs.layers[:, EXIT])


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_the_pieces_of_a_layer_run(family):
    stack = BaseStack(tiny_base(family).requires_grad_(False))
    costs = stack.measure_costs("flops")
    hidden, rotation = inputs(stack)
    tokens = hidden.shape[0] * hidden.shape[1]
    for layer, block in enumerate(stack.blocks):
        share = costs.layers[layer] * costs.total * tokens
        assert measured(block.keys_values, hidden, rotation) == pytest.approx(float(share[SKIP]))

        def whole_layer(block=block):
            queries, keys_values = block.queries_keys_values(hidden, rotation)
            attended = block.add_attention(hidden, queries, *keys_values.chunk(2, dim=1), None)
            return block.add_feed_forward(hidden, attended)

        assert measured(whole_layer) == pytest.approx(float(share[PROCESS]))
    assert measured(stack.logits, hidden) == pytest.approx(costs.head * costs.total * tokens)


@pytest.mark.usefixtures("always_gather")
@pytest.mark.parametrize("plan", ["PPPP", "PSSP", "SSSS", "PSEE"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_trace_tells_the_flops_of_a_forward(family, plan):
    model = wrap(tiny_base(family), cost_unit="flops", plans=[plan])
    ids = token_ids()
    budget = 1.0 if plan == "PPPP" else 0.0
    # A plain cache is written at once; in ours, what is skipped waits until it is needed.
    found = measured(model, ids, energy_budget=budget, past_key_values=DynamicCache())
    trace = model(ids, energy_budget=budget).execution
    assert found == pytest.approx(trace.mean_cost * model.costs.total * ids.numel())


@pytest.mark.usefixtures("always_gather")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_trace_tells_the_flops_where_tokens_differ(family):
    model = wrap(tiny_base(family), cost_unit="flops")
    ids = token_ids(rows=1)
    trace = model(ids, energy_budget=0.7).execution
    assert 0 < trace.depth.float().var(), "tokens of one forward should take different actions"
    found = measured(model, ids, energy_budget=0.7, past_key_values=DynamicCache())
    assert found == pytest.approx(trace.mean_cost * model.costs.total * ids.numel())


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_of_the_parameters(family):
    base = tiny_base(family)
    stack = BaseStack(base.requires_grad_(False))
    costs = stack.measure_costs("bytes")
    embeddings = [base.get_input_embeddings(), base.get_output_embeddings(), stack.final_norm]
    if family == "gpt2":
        embeddings.append(base.transformer.wpe)
    outside = {id(parameter) for module in embeddings for parameter in module.parameters()}
    layers = [parameter for parameter in base.parameters() if id(parameter) not in outside]
    own = sum(parameter.numel() * parameter.element_size() for parameter in layers)
    assert float(costs.layers[:, PROCESS].sum()) * costs.total == pytest.approx(own)
    head = [*stack.final_norm.parameters(), *stack.base.get_output_embeddings().parameters()]
    assert costs.head * costs.total == pytest.approx(sum(p.numel() * p.element_size() for p in head))


@pytest.mark.parametrize("unit", COUNTED)
def test_shares_do_not_depend_on_the_dtype(unit):
    base = tiny_base()
    full = BaseStack(base.requires_grad_(False)).measure_costs(unit)
    half = BaseStack(base.to(torch.bfloat16)).measure_costs(unit)
    torch.testing.assert_close(half.layers, full.layers)
    assert half.head == pytest.approx(full.head)
    assert half.total == (full.total / 2 if unit == "bytes" else full.total)


@pytest.mark.parametrize("unit", COUNTED)
def test_shares_do_not_depend_on_whether_projections_are_joined(unit):
    model = wrap(cost_unit=unit)
    before = model.costs.layers.clone()
    model(token_ids(), energy_budget=0.5)
    assert torch.equal(BaseStack(model.base).measure_costs(unit).layers, before)


@pytest.mark.parametrize("precisions", [None, ["int8"]])
def test_the_work_of_a_layer_is_counted_once_in_each_variant(precisions, monkeypatch):
    base, counted, count = tiny_base(), [], LayerWork.of
    monkeypatch.setattr(LayerWork, "of", lambda block: counted.append(block) or count(block))
    model = wrap(base, precisions=precisions)
    assert len(counted) == len({id(block) for block in counted}) == LAYERS * len(model.config.table.variants)
    for variant, works in model.costs.works.items():
        assert works == [count(block) for block in model.stack.blocks_of(variant)]


def test_costs_of_actions_are_sums_over_layers():
    torch.manual_seed(0)
    costs = CostTable(torch.rand(5, len(DEFAULT_TABLE), dtype=torch.float64), 0.1, 100.0, HARDWARE["flops"])
    actions = torch.randint(0, len(DEFAULT_TABLE), (3, 7, 2), dtype=torch.uint8)
    found = costs.of_actions(actions, first=2)
    for b in range(3):
        for t in range(7):
            expected = sum(float(costs.layers[2 + layer, int(actions[b, t, layer])]) for layer in range(2))
            assert float(found[b, t]) == pytest.approx(expected)
    assert costs.of_actions(actions[..., :0]).tolist() == [[0.0] * 7] * 3


@pytest.mark.parametrize("unit", COUNTED)
def test_cost_of_a_module_of_ours(unit):
    costs = CostTable(torch.ones(1, len(DEFAULT_TABLE), dtype=torch.float64), 0.1, 1000.0, HARDWARE[unit])
    module = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))
    x = torch.randn(1, 3)
    expected = measured(module, x) if unit == "flops" else 4 * (3 * 5 + 5 + 5 * 2 + 2)
    assert costs.of_module(module) * 1000.0 == pytest.approx(expected) and HARDWARE[unit].price(work_of([module])) == expected


def test_a_learned_controller_is_charged_what_it_runs():
    model = wrap(controller="learned", cost_unit="flops")
    hidden, ones = torch.randn(7, model.config.text_config.hidden_size), torch.ones(7, dtype=torch.float64)
    seen = Observation(hidden, hidden, 0.5 * ones, 0.1 * ones, torch.arange(7), model.stack.logits)
    for segment in range(len(model.controller.segments)):
        cost = model.controller.decide(segment, seen).cost
        assert cost > 0
        assert measured(model.controller.decide, segment, seen) == pytest.approx(cost * model.costs.total * 7)
