"""Weights in 8 and in 4 bits: what they round, and the invariants with every precision on every family."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_anee import AneeForCausalLM, base_int4
from modeling_anee.base_int4 import GROUP, Int4Linear, dequantise, quantise
from modeling_anee.base_int8 import Int8Linear

from .tiny import BRIDGES, CONFIGS, FAMILIES, LAYERS, tiny_base, token_ids, wrap


# What two ways to the same result may differ by: exact integers but for the norms and attention around them; bfloat16.
APART = {"int8": 2e-3, "int4": 0.25}
PLANS = {
    "int8": [f"{LAYERS}*INT8 / int8"],
    "int4": [f"{LAYERS}*INT4 / int4"],
    "mixed": ["INT8, INT4_INT8, INT4_SKIP_FFN, SKIP_INT4 / int8"],
    "leaving": ["INT8, INT4, 2*EXIT_INT4 / int4"],
}
sizes = st.integers(1, 70)


def model_of(family: str, plan: str, **fields) -> AneeForCausalLM:
    fields = {"precisions": ["int8", "int4"], "keep_first_tokens": 0} | fields
    return wrap(tiny_base(family), controller="plan", plans=PLANS[plan], **BRIDGES, **fields)


def apart(plan: str) -> float:
    return APART["int8" if plan == "int8" else "int4"]


@settings(max_examples=30, deadline=None)
@given(outputs=sizes, inputs=st.integers(16, 90), rows=st.integers(1, 40), seed=st.integers(0, 99), bias=st.booleans())
def test_int8_is_its_rounded_weights_to_16_bits_and_no_row_sees_the_others(outputs, inputs, rows, seed, bias):
    torch.manual_seed(seed)
    weight, x = torch.randn(outputs, inputs), torch.randn(rows, inputs) * torch.rand(rows, 1) * 100
    linear = Int8Linear(weight, torch.randn(outputs) if bias else None)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((linear.dequantised(torch.float32) - weight).abs() <= step / 2 + 1e-6).all()
    whole = linear(x)
    expected = F.linear(x, linear.dequantised(torch.float32), linear.bias)
    largest = x.abs().amax(dim=1, keepdim=True) * weight.abs().sum(dim=1)
    assert ((whole - expected).abs() <= 1e-4 * largest + 1e-5).all()
    several = linear(torch.cat((x, -x)))  # other mates
    assert torch.equal(several[:rows], whole) or rows == 1
    # A row alone has a way of its own: of its activations it may round one at a tie the other way.
    for row in range(rows):
        assert ((linear(x[row]) - whole[row]).abs() <= 1e-5 * largest[row] + 1e-5).all()
    start = outputs // 2
    assert torch.equal(linear.rows(start, None)(x), whole[:, start:])


def test_sums_of_int8_never_leave_32_bits():
    linear = Int8Linear(torch.ones(2, 20000), None)
    assert linear.largest < 1000  # 20000 * 127 * 127 * 256 would
    torch.testing.assert_close(linear(torch.ones(1, 20000)), torch.full((1, 2), 20000.0), rtol=2e-3, atol=0)


@settings(max_examples=20, deadline=None)
@given(outputs=sizes, inputs=sizes, rows=st.sampled_from([1, 3, 30]), seed=st.integers(0, 99))
def test_few_and_many_rows_of_int4_differ_by_bfloat16_alone(outputs, inputs, rows, seed):
    torch.manual_seed(seed)
    weight, x = torch.randn(outputs, inputs), torch.randn(rows, inputs)
    linear, exact = Int4Linear(weight, torch.randn(outputs)), Int4Linear(weight, None)
    found, expected = linear(x) - linear.bias, F.linear(x, exact.dequantised(torch.float32))
    assert float((found - expected).norm()) <= 0.02 * float(expected.norm()) + 0.02
    torch.testing.assert_close(linear.rows(outputs // 2, None)(x), linear(x)[:, outputs // 2 :])


@pytest.mark.parametrize("outputs, inputs", [(16, 32), (21, 70), (300, 320)])
def test_small_maps_of_4_bits_keep_the_same_integers(outputs, inputs, monkeypatch):
    monkeypatch.setattr(base_int4, "PART", 1)  # made in many parts
    torch.manual_seed(0)
    weight, x = torch.randn(outputs, inputs), torch.randn(30, inputs)
    small, usual = Int4Linear(weight, torch.randn(outputs), small=True), Int4Linear(weight, None)
    assert torch.equal(small._integers(), usual._integers())
    torch.testing.assert_close(small.rows(5, None)(x), small(x)[:, 5:])
    found, expected = small(x) - small.bias, usual(x)
    assert float((found - expected).norm()) <= 0.02 * float(expected.norm()) + 0.02
    torch.testing.assert_close(small.dequantised(torch.float32), usual.dequantised(torch.float32), atol=1e-3, rtol=0)


def test_weights_on_a_grid_of_4_bits_are_kept():
    torch.manual_seed(0)
    grid = torch.randint(0, 16, (6, 2 * GROUP)).float()
    grid[:, 0], grid[:, 1], grid[:, GROUP], grid[:, GROUP + 1] = 0, 15, 0, 15
    weight = grid / 8 - 1
    integers, scales = quantise(weight)
    torch.testing.assert_close(dequantise(integers, scales.transpose(0, 1)), weight, atol=1e-2, rtol=0)


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_gradients_of_the_inputs_are_those_of_the_rounded_weights(kind):
    torch.manual_seed(0)
    linear, x = kind(torch.randn(16, 32), None), torch.randn(3, 32, requires_grad=True)
    linear(x).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    F.linear(other, linear.dequantised(torch.float32)).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", sorted(CONFIGS))
@torch.no_grad()
def test_scoring_is_decoding_and_rows_are_alone(family, plan):
    model = model_of(family, plan)
    ids = token_ids(2, 7)
    whole = model(ids, energy_budget=0.0)
    steps, cache = [], None
    for token in range(ids.shape[1]):
        output = model(ids[:, token : token + 1], cache=cache, use_cache=True, energy_budget=0.0)
        cache = output.cache
        steps.append(output.logits)
    close = {"atol": apart(plan), "rtol": 0}
    torch.testing.assert_close(torch.cat(steps, dim=1), whole.logits, **close)
    for row in range(2):
        torch.testing.assert_close(model(ids[row : row + 1], energy_budget=0.0).logits[0], whole.logits[row], **close)
    assert (whole.execution.cost == whole.execution.cost[0, 0]).all()
    assert whole.execution.mean_cost == pytest.approx(model.controller.floor)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_at_a_budget_of_1_nothing_is_lost_and_8_bits_lose_little(family):
    base = tiny_base(family)
    model, ids = wrap(copy.deepcopy(base), controller="plan", precisions=["int8", "int4"]), token_ids(2, 7)
    expected = base(ids).logits
    torch.testing.assert_close(model(ids, energy_budget=1.0).logits, expected, atol=1e-5, rtol=1e-4)
    eighth = model_of(family, "int8")(ids, energy_budget=0.0)
    assert float((eighth.logits - expected).norm()) < 0.1 * float(expected.norm())
    assert eighth.execution.mean_cost < 0.4 and int(eighth.execution.head.min()) == 2


@pytest.mark.parametrize("variant", ["int8", "int4"])
@torch.no_grad()
def test_keys_and_values_of_what_is_left_out_are_in_the_plans_variant(variant):
    name = variant.upper()
    model = wrap(tiny_base(), controller="plan", precisions=[variant], plans=[f"{name}, SKIP_{name}, {name}, {name}"])
    ids = token_ids(1, 6)
    output = model(ids, energy_budget=0.0, use_cache=True, output_hidden_states=True)
    entering = output.hidden_states[1][:, 1:]
    rotation = model.stack.rotations(entering, torch.arange(1, 6).unsqueeze(0))[1]
    keys, values = model.stack.blocks_of(variant)[1].keys_values(entering, rotation).chunk(2, dim=1)
    torch.testing.assert_close(output.cache.layers[1].keys[:, :, 1:], keys, atol=apart(variant), rtol=0)
    torch.testing.assert_close(output.cache.layers[1].values[:, :, 1:], values, atol=apart(variant), rtol=0)


@torch.no_grad()
def test_rows_of_different_budgets_have_heads_of_their_own():
    model, ids = wrap(tiny_base(), controller="plan", precisions=["int8", "int4"], keep_first_tokens=0), token_ids(3, 5)
    budgets = [1.0, 0.35, 0.2]
    together = model(ids, energy_budget=budgets)
    assert together.execution.head.unique().tolist() == [0, 2]
    for row, budget in enumerate(budgets):
        alone = model(ids[row : row + 1], energy_budget=budget)
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=APART["int4"], rtol=0)
        torch.testing.assert_close(together.execution.row_cost[row], alone.execution.row_cost[0])


@torch.no_grad()
def test_plans_of_precisions_cost_ever_less_and_keep_the_budget():
    model = wrap(tiny_base(), controller="plan", precisions=["int8", "int4"], keep_first_tokens=0)
    ids, costs = token_ids(1, 60), []
    for budget in (1.0, 0.8, 0.6, 0.4, 0.3, 0.25, 0.1):
        cost = model(ids, energy_budget=budget).execution.mean_cost
        assert abs(cost - max(budget, model.controller.floor)) < 0.02
        costs.append(cost)
    assert costs == sorted(costs, reverse=True)


@torch.no_grad()
def test_generation_is_that_of_one_forward_and_follows_weights_that_were_moved(tmp_path):
    model, ids = model_of("llama", "int8"), token_ids(1, 6)
    found = model.generate(ids, max_new_tokens=5, do_sample=False, energy_budget=0.0)
    assert torch.equal(model(found[:, :-1], energy_budget=0.0).logits[0, 5:].argmax(dim=-1), found[0, 6:])
    before = model(ids, energy_budget=0.0).logits
    for layer in model.base.model.layers:
        layer.mlp.down_proj.weight = torch.nn.Parameter(-layer.mlp.down_proj.weight, requires_grad=False)
    assert float((model(ids, energy_budget=0.0).logits - before).abs().max()) > 0.1


def test_the_kept_first_tokens_run_whole_in_the_precision_of_the_plan():
    plans = ["INT4, SKIP_INT4, INT4_SKIP_FFN, INT8 / int8"]
    model = wrap(tiny_base(), controller="plan", precisions=["int8", "int4"], keep_first_tokens=2, plans=plans)
    ids, budget = token_ids(2, 6), 0.0
    trace = model(ids, energy_budget=budget).execution
    names = [[model.config.table.names[action] for action in row] for row in trace.actions[0].tolist()]
    assert names[:2] == [["INT4", "INT4", "INT4", "INT8"]] * 2
    assert names[2:] == [["INT4", "SKIP_INT4", "INT4_SKIP_FFN", "INT8"]] * 4
    assert trace.head.eq(model.config.table.heads.index("int8")).all()
    assert torch.equal(trace.cost.double(), model.costs.of_plans(trace.actions, trace.head).float().double())


def scaled(base):
    base.model.layers[1].mlp.down_proj.weight.mul_(-1.0)


def loaded(base):
    base.load_state_dict(tiny_base(seed=1).state_dict())


def optimised(base):
    weight = base.model.layers[2].self_attn.q_proj.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=1.0).step()
    weight.grad = None


def scaled_head(base):
    base.lm_head.weight.mul_(2.0)


@pytest.mark.parametrize("write", [scaled, loaded, optimised, scaled_head], ids=lambda write: write.__name__)
@torch.no_grad()
def test_weights_that_were_written_over_in_place_are_rounded_anew(write):
    base, ids, fields = tiny_base(), token_ids(1, 6), {"precisions": ["int8"], "plans": PLANS["int8"], "keep_first_tokens": 0}
    model = wrap(base, **fields)
    before = model(ids, energy_budget=0.0).logits
    write(base)
    after = model(ids, energy_budget=0.0).logits
    assert float((after - before).abs().max()) > 0.1
    assert torch.equal(after, wrap(base, **fields)(ids, energy_budget=0.0).logits)
    assert not model.stack.changed
