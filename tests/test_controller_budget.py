"""`budget` with precisions: the variant of each segment of layers is chosen from what is left of the budget."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_anee import AneeForCausalLM
from modeling_anee.actions import PROCESS
from modeling_anee.controller import Observation
from modeling_anee.costs import CostTable

from .tiny import BRIDGES, FAMILIES, LAYERS, tiny_base, token_ids, wrap


few = settings(max_examples=12, deadline=None, derandomize=True)
BUDGETS = [step / 20 for step in range(20)] + [0.99]
APART = 0.25  # int4: a few rows run in a kernel that rounds to bfloat16
intervals = st.integers(1, LAYERS)
thresholds = st.sampled_from([0.0, 0.2, 0.5])


def model_of(family: str = "llama", **fields) -> AneeForCausalLM:
    fields = {"precisions": ["int8", "int4"], "keep_first_tokens": 0} | fields
    return wrap(tiny_base(family), controller="budget", **fields)


def fields_of(data, mode: str) -> dict:
    return {
        "decision_interval": data.draw(intervals),
        "exit_budget_threshold": data.draw(thresholds),
        "min_layers": data.draw(st.integers(0, LAYERS)),
        "keep_last_layers": data.draw(st.integers(0, LAYERS)),
        "budget_mode": mode,
    }


def rebuilt(model: AneeForCausalLM, **fields):
    """A controller of other fields over the costs of a model."""
    config = copy.deepcopy(model.config)
    for name, value in fields.items():
        setattr(config, name, value)
    controller = type(model.controller)(config)
    controller.bind(model.costs)
    return controller


def ask(controller, costs: CostTable, table, budget: float, tokens: int, wasted: float = 0.0) -> tuple:
    """Actions [N, L], heads [N] and costs float64 [N] of tokens of one budget, as the executor asks about them.

    `wasted` is spent by somebody else before the second decision.
    """
    index, budgets = torch.arange(tokens), torch.full((tokens,), budget, dtype=torch.float64)
    actions, heads = torch.zeros(tokens, LAYERS, dtype=torch.uint8), torch.zeros(tokens, dtype=torch.uint8)
    hidden = torch.zeros(tokens, 1)
    for segment, (start, stop) in enumerate(controller.segments):
        stays = torch.ones(tokens, dtype=torch.bool) if start == 0 else ~table.leaving[actions[:, start - 1].long()]
        actions[~stays, start:stop] = actions[~stays, max(start - 1, 0)].unsqueeze(1)
        if not stays.any():
            continue
        spent = costs.of_heads(heads) + costs.of_actions(actions[:, :start]) + (wasted if segment else 0.0)
        decision = controller.decide(
            segment, Observation(hidden, hidden, budgets[stays], spent[stays], index[stays], lambda x: x)
        )
        chosen, leaves = decision.actions, table.leaving[decision.actions.long()]
        actions[stays, start:stop] = chosen
        assert torch.equal(leaves, leaves.cumsum(dim=1) > 0)  # whoever left has left
        if decision.head is not None:
            heads[stays] = decision.head
    return actions, heads, costs.of_plans(actions, heads)


MODEL = model_of(**BRIDGES)  # bridges cost the same in every layer
TABLE = MODEL.config.table


@few
@given(data=st.data())
def test_the_mean_is_the_budget_and_a_lower_one_costs_less(data):
    controller = rebuilt(MODEL, **fields_of(data, "average"))
    means = []
    for budget in BUDGETS:
        actions, heads, cost = ask(controller, MODEL.costs, TABLE, budget, 300)
        means.append(float(cost.mean()))
        assert abs(means[-1] - max(budget, controller.floor)) <= 0.01
    assert means == sorted(means)


@few
@given(data=st.data())
def test_strict_never_costs_more_than_the_budget_nor_less_by_a_step(data):
    controller = rebuilt(MODEL, **fields_of(data, "strict"))
    before = 0.0
    for budget in BUDGETS:
        actions, heads, cost = ask(controller, MODEL.costs, TABLE, budget, 3)
        assert (cost == cost[0]).all() and before - 1e-9 <= float(cost[0]) <= max(budget, controller.floor) + 1e-9
        before = float(cost[0])


@few
@given(data=st.data())
def test_what_is_spent_elsewhere_makes_the_next_segments_cheaper(data):
    fields = {"exit_budget_threshold": 0.0, "decision_interval": data.draw(st.integers(1, LAYERS - 1))}
    controller = rebuilt(MODEL, **fields_of(data, "strict") | fields)
    budget, wasted = data.draw(st.sampled_from(BUDGETS)), data.draw(st.floats(0.0, 0.5))
    plain, _, before = ask(controller, MODEL.costs, TABLE, budget, 1)
    other, heads, after = ask(controller, MODEL.costs, TABLE, budget, 1, wasted)
    first, cheapest = controller.segments[0][1], ask(controller, MODEL.costs, TABLE, 0.0, 1)
    assert torch.equal(plain[:, :first], other[:, :first]) and float(after) <= float(before) + 1e-9
    least = MODEL.costs.of_plans(torch.cat((other[:, :first], cheapest[0][:, first:]), dim=1), cheapest[1])
    assert float(after) + wasted <= max(budget, float(least) + wasted) + 1e-9


def test_variants_fall_from_the_last_layer_on_and_only_then_is_skipped():
    names = []
    for budget in BUDGETS:
        actions, heads, _ = ask(rebuilt(MODEL, budget_mode="strict", decision_interval=2), MODEL.costs, TABLE, budget, 1)
        order = [["PROCESS", "INT8", "INT4", "SKIP_INT4"].index(TABLE.names[action]) for action in actions[0].tolist()]
        kept = order[:-1] if 3 in order else order  # the last layer is kept
        assert kept == sorted(kept) and max(order) - min(kept) <= 1 and int(heads[0]) == TABLE.heads.index("int8")
        names += order
    assert set(names) == {0, 1, 2, 3}


def test_without_precisions_there_is_one_decision():
    assert wrap(tiny_base(), "budget").controller.segments == [(0, LAYERS)]
    assert model_of(decision_interval=3).controller.segments == [(0, 3), (3, LAYERS)]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_invariants_on_models(family):
    base, ids = tiny_base(family), token_ids(3, 40)
    model = wrap(base, "budget", precisions=["int8", "int4"], keep_first_tokens=0, exit_budget_threshold=0.15, **BRIDGES)
    full = model(ids, energy_budget=1.0)
    torch.testing.assert_close(full.logits, base(ids).logits, atol=1e-5, rtol=1e-4)
    assert (full.execution.actions == PROCESS).all() and (full.execution.cost == 1.0).all()
    costs = []
    for budget in (0.1, 0.2, 0.3, 0.6, 0.9):
        trace = model(ids, energy_budget=budget).execution
        paid = model.costs.of_plans(trace.actions, trace.head)
        torch.testing.assert_close(trace.cost, paid.float())
        assert abs(trace.mean_cost - max(budget, model.controller.floor)) <= 0.02
        costs.append(trace.mean_cost)
    assert costs == sorted(costs)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scoring_is_decoding_and_rows_are_alone(family):
    model, ids, budgets = model_of(family, decision_interval=2), token_ids(3, 8), [0.9, 0.3, 0.12]
    whole = model(ids, energy_budget=budgets)
    cache, parts = None, []
    for token in ids.split(1, dim=1):
        parts.append(model(token, cache=cache, use_cache=True, energy_budget=budgets))
        cache = parts[-1].cache
    torch.testing.assert_close(torch.cat([part.logits for part in parts], dim=1), whole.logits, atol=APART, rtol=0)
    assert torch.equal(cache.execution_log.trace.actions, whole.execution.actions)
    assert torch.equal(cache.execution_log.trace.head, whole.execution.head)
    for row, budget in enumerate(budgets):
        alone = model(ids[row : row + 1], energy_budget=budget)
        torch.testing.assert_close(alone.logits[0], whole.logits[row], atol=APART, rtol=0)
        assert torch.equal(alone.execution.actions[0], whole.execution.actions[row])


@pytest.mark.parametrize("controller", ["budget", "plan"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_budget_that_falls_amid_a_text_switches_variants_from_that_token_on(family, controller):
    model, ids = wrap(tiny_base(family), controller, precisions=["int8", "int4"], keep_first_tokens=0), token_ids(2, 10)
    falls = torch.full((2, 10), 0.8, dtype=torch.float64)
    falls[:, 6:] = 0.2
    whole = model(ids, energy_budget=falls).execution
    before, after = (model(ids, energy_budget=budget).execution for budget in (0.8, 0.2))
    assert torch.equal(whole.actions[:, :6], before.actions[:, :6]) and torch.equal(whole.actions[:, 6:], after.actions[:, 6:])
    assert not torch.equal(before.actions[:, 6:], after.actions[:, 6:])
    cache, logits = None, []
    for token in range(10):
        part = model(ids[:, token : token + 1], cache=cache, use_cache=True, energy_budget=falls[:, token : token + 1])
        cache = part.cache
        logits.append(part.logits)
    trace = cache.execution_log.trace
    assert torch.equal(trace.actions, whole.actions) and torch.equal(trace.head, whole.head)
    scored = model(ids, energy_budget=falls).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), scored, atol=APART, rtol=0)


@pytest.mark.parametrize("controller", ["budget", "plan", "learned"])
@torch.no_grad()
def test_in_a_generation_the_prompts_variants_end_with_the_prompt(controller):
    model, ids = wrap(tiny_base(), controller, precisions=["int8", "int4"], keep_first_tokens=0), token_ids(2, 5)
    made = model.generate(
        ids, max_new_tokens=6, do_sample=False, prompt_energy_budget=0.8, energy_budget=0.2, return_dict_in_generate=True
    )
    budgets = torch.where(torch.arange(10) < 5, 0.8, 0.2).double().expand(2, 10)
    scored = model(made.sequences[:, :-1], energy_budget=budgets).execution
    assert torch.equal(made.execution.head, scored.head)
    if controller != "learned":  # whose signals differ by the rounding of 4 bits
        assert torch.equal(made.execution.actions, scored.actions)


@torch.no_grad()
def test_feedback_in_a_generation_moves_the_variants_of_its_tokens():
    model, ids = model_of(keep_first_tokens=4), token_ids(1, 4)
    plain = model.generate(ids, max_new_tokens=30, do_sample=False, energy_budget=0.5, return_dict_in_generate=True)
    moved = model.generate(
        ids, max_new_tokens=30, do_sample=False, energy_budget=0.5, budget_feedback=1.0, return_dict_in_generate=True
    )
    costs = moved.execution.cost[0, 4:].double()
    assert len(set(plain.execution.cost[0, 4:].tolist())) > 1
    assert abs(float(costs.mean()) - 0.5) < 0.01
