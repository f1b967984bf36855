"""`plan` and `budget`: the budget is kept, layers are given up in order, and what must be kept is."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from modeling_anee.actions import DEFAULT_TABLE, EXIT, PROCESS, SKIP

from .fakes import EXACT, STRETCH, budgets, build, fewer, layer_limits, random_costs, random_plans, relaxed, run, seeds


def plan_fields(data, layers: int) -> dict:
    """Any of the three ways in which a `plan` controller gets its plans."""
    kind = data.draw(st.sampled_from(["default", "order", "plans"]))
    if kind == "plans":
        return {"plans": data.draw(random_plans(layers))}
    if kind == "order":
        return {"skip_order": data.draw(st.lists(st.integers(0, layers - 1), unique=True))}
    return data.draw(layer_limits(layers))


@given(st.integers(1, 40), seeds, budgets, st.integers(0, 10**6), st.data())
@relaxed
def test_plan_keeps_the_budget_over_any_long_stretch(layers, seed, budget, start, data):
    costs = random_costs(layers, seed)
    controller = build("plan", costs, **plan_fields(data, layers))
    _, cost = run(controller, costs, budget, torch.arange(start, start + STRETCH))
    if budget <= controller.floor:
        assert cost.tolist() == pytest.approx([controller.floor] * STRETCH, abs=EXACT)
    else:
        assert abs(float(cost.mean()) - budget) <= 0.02


@given(st.integers(1, 40), seeds, budgets, budgets, st.integers(0, 10**6), st.data())
@relaxed
def test_budget_keeps_the_budget_over_any_long_stretch(layers, seed, budget, threshold, start, data):
    costs = random_costs(layers, seed)
    limits = data.draw(layer_limits(layers))
    controller = build("budget", costs, exit_budget_threshold=threshold, **limits)
    actions, cost = run(controller, costs, budget, torch.arange(start, start + STRETCH))
    lowest = {}
    for action, kept in ((EXIT, 0), (SKIP, limits["keep_last_layers"])):
        cheapest = torch.full((layers,), action)
        cheapest[: limits["min_layers"]] = PROCESS
        cheapest[layers - kept :] = PROCESS
        lowest[action] = float(costs.of_plans(cheapest))
    exits = threshold > 0 and budget <= max(threshold, lowest[SKIP])
    expected = min(lowest[EXIT], 1.0) if threshold > 0 else lowest[SKIP]
    assert controller.floor == pytest.approx(expected)
    assert abs(float(cost.mean()) - max(budget, controller.floor)) <= 0.02
    assert (actions != (SKIP if exits else EXIT)).all()


@pytest.mark.parametrize("kind", ["plan", "budget"])
@given(st.integers(1, 40), seeds, budgets, st.data())
@relaxed
def test_strict_keeps_every_token_within_the_budget(kind, layers, seed, budget, data):
    costs = random_costs(layers, seed)
    if kind == "plan":
        fields = plan_fields(data, layers)
    else:
        fields = data.draw(layer_limits(layers)) | {"exit_budget_threshold": data.draw(budgets)}
    controller = build(kind, costs, budget_mode="strict", **fields)
    _, cost = run(controller, costs, budget, torch.arange(100))
    assert (cost <= max(budget, controller.floor) + EXACT).all() and (cost == cost[0]).all()
    assert controller.keep_first == 0
    # It is the dearest plan that is affordable: the average mode spends no less.
    average = build(kind, costs, **fields)
    assert average.keep_first == 1 and float(run(average, costs, budget, torch.arange(100))[1].mean()) >= float(cost[0]) - 0.02


@pytest.mark.parametrize("mode", ["average", "strict"])
@pytest.mark.parametrize("kind", ["plan", "budget"])
@given(st.integers(1, 40), seeds, st.lists(budgets, min_size=2, max_size=8), st.data())
@settings(fewer, max_examples=40)
def test_no_token_costs_more_at_a_lower_budget(kind, mode, layers, seed, values, data):
    costs = random_costs(layers, seed)
    fields = {"plans": data.draw(random_plans(layers))} if kind == "plan" else data.draw(layer_limits(layers))
    controller = build(kind, costs, budget_mode=mode, **fields)
    spent = [run(controller, costs, budget, torch.arange(STRETCH))[1] for budget in sorted(values)]
    for lower, higher in zip(spent, spent[1:], strict=False):
        assert (lower <= higher + EXACT).all()


@given(st.integers(1, 20), seeds, st.data())
@relaxed
def test_plan_meets_the_cost_of_a_plan_with_that_plan_alone(layers, seed, data):
    costs = random_costs(layers, seed)
    plans = data.draw(random_plans(layers))
    chosen = torch.tensor(DEFAULT_TABLE.plan(data.draw(st.sampled_from(plans)), layers), dtype=torch.uint8)
    budget = float(costs.of_plans(chosen))
    assume(budget < 1.0)
    _, cost = run(build("plan", costs, plans=plans), costs, budget, torch.arange(50))
    assert cost.tolist() == pytest.approx([budget] * 50, abs=EXACT)


@pytest.mark.parametrize("kind", ["plan", "budget"])
@given(st.integers(1, 12), seeds, st.data())
@fewer
def test_first_and_last_layers_are_kept(kind, layers, seed, data):
    limits = data.draw(layer_limits(layers))
    costs = random_costs(layers, seed)
    actions, _ = run(build(kind, costs, **limits), costs, torch.linspace(0, 0.999, 50, dtype=torch.float64))
    assert (actions[:, : limits["min_layers"]] == PROCESS).all()
    assert (actions[:, layers - limits["keep_last_layers"] :] == PROCESS).all()


def test_plan_gives_up_the_layers_of_an_order_one_after_the_other():
    costs = random_costs(6)
    controller = build("plan", costs, skip_order=[4, 2, 3])
    actions, _ = run(controller, costs, torch.linspace(0, 0.999, 200, dtype=torch.float64))
    found = {"".join(DEFAULT_TABLE[value].letter for value in row) for row in actions.tolist()}
    assert found == {"PPPPPP", "PPPPSP", "PPSPSP", "PPSSSP"}


def test_budget_exits_at_and_below_the_threshold_only():
    costs = random_costs(8)
    controller = build("budget", costs, exit_budget_threshold=0.5, keep_last_layers=2)
    actions, _ = run(controller, costs, torch.tensor([0.3, 0.5, 0.501, 0.9]), torch.full((4,), 3))
    assert [EXIT in row for row in actions.tolist()] == [True, True, False, False]
    assert [SKIP in row for row in actions.tolist()] == [False, False, True, True]
    assert (actions[2:, -2:] == PROCESS).all() and (actions[:2, -1] == EXIT).all()


def test_budget_processes_from_the_bottom():
    costs = random_costs(8)
    actions, _ = run(build("budget", costs), costs, torch.linspace(0, 0.999, 100, dtype=torch.float64))
    skipped = (actions[:, :-1] == SKIP).int()
    assert (skipped.diff(dim=1) >= 0).all() and skipped.sum() > 0
