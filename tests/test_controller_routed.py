"""`routed`: which plans there are, what a price does, strict budgets, and the account that keeps a text on its budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_anee.actions import PROCESS
from modeling_anee.budget import Dial
from modeling_anee.controller import Observation
from modeling_anee.controller_routed import FEEDBACK

from .fakes import EXACT, build, fewer, random_costs, randomise, run, seeds, states, unsure
from .tiny import token_ids, wrap


LAYERS = 8
LONG = 5000  # tokens of a text: random weights are far from their calibration
CALIBRATION = {"budgets": [0.3, 0.9], "settings": [2.0, -2.0]}
some_budgets = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=5, unique=True)


def routed(seed=0, **fields):
    """A router of random weights, that expects cheaper plans to lose more, and the costs that it is bound to."""
    costs = random_costs(LAYERS, seed)
    controller = build("routed", costs, **fields)
    randomise(controller, seed)
    expect_cheap_plans_to_lose_more(controller)
    return controller, costs


def expect_cheap_plans_to_lose_more(controller):
    with torch.no_grad():
        controller.predictor[-1].weight.mul_(0.1)
        controller.predictor[-1].bias.copy_(torch.linspace(-4.0, 1.0, len(controller.plans)))


@fewer
@given(some_budgets, st.integers(0, LAYERS), seeds)
def test_plans_are_those_of_the_budgets_after_the_layers_that_are_always_processed(budgets, first, seed):
    controller, costs = routed(seed, router_budgets=budgets, min_layers=first)
    assert len(controller.plans) == 1 + len(budgets)
    assert (controller.plans[0] == PROCESS).all() and (controller.plans[:, :first] == PROCESS).all()
    torch.testing.assert_close(controller.plan_costs, costs.of_plans(controller.plans))
    assert controller.floor == pytest.approx(float(controller.plan_costs.min()) + costs.of_module(controller.predictor))
    for budget, plan in zip(sorted(budgets, reverse=True), controller.plans[1:], strict=True):
        cheapest = float(costs.of_plans(controller.plans).min())
        if first == 0:
            assert float(costs.of_plans(plan)) <= max(budget, cheapest) + EXACT


def test_untrained_it_processes_everything():
    controller, costs = routed()
    controller.reset_parameters()
    assert (run(controller, costs, 0.1, hidden=states(20))[0] == PROCESS).all()


@fewer
@given(seeds)
def test_a_higher_price_never_makes_a_token_dearer(seed):
    controller, costs = routed(seed)
    hidden, before = states(50, seed), torch.full((50,), torch.inf, dtype=torch.float64)
    for setting in (-12.0, -2.0, 0.0, 1.0, 3.0, 12.0):
        controller.dial = Dial(None, neutral=setting)
        spent = run(controller, costs, 0.5, hidden=hidden)[1]
        assert (spent <= before + EXACT).all()
        before = spent
    assert float(before.min()) == pytest.approx(controller.floor)


@fewer
@given(seeds, st.floats(0.0, 0.999))
def test_a_strict_budget_is_kept_by_every_token(seed, budget):
    controller, costs = routed(seed, budget_mode="strict", calibration=CALIBRATION)
    assert (run(controller, costs, budget, hidden=states(30, seed))[1] <= max(budget, controller.floor) + EXACT).all()


@pytest.mark.parametrize("budget", [0.5, 0.6, 0.7])
@pytest.mark.parametrize("wrong", [-1.0, 0.0, 1.0])
def test_a_text_is_kept_on_its_budget_whatever_the_calibration_text_was_like(budget, wrong):
    calibration = {"budgets": [0.3, 0.9], "settings": [2.0 + wrong, -2.0 + wrong]}
    controller, costs = routed(calibration=calibration)
    assert controller.floor < 0.5
    spent = run(controller, costs, budget, hidden=states(LONG))[1]
    assert abs(float(spent.mean()) - budget) <= 0.02
    assert len(spent.unique()) > 2


@fewer
@given(data=st.data())
def test_tokens_are_chosen_in_turn_each_row_by_its_own_account(data):
    """Rows of different length side by side, against one token after the other."""
    seed = data.draw(seeds)
    controller, costs = routed(seed, calibration=CALIBRATION)
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    count = sum(lengths)
    row = torch.repeat_interleave(
        torch.tensor(sorted(data.draw(st.sets(st.integers(0, 9), min_size=4))))[: len(lengths)], torch.tensor(lengths)
    )
    generator = torch.Generator().manual_seed(seed)
    budget = 0.3 + 0.6 * torch.rand(count, generator=generator, dtype=torch.float64)
    account = 20 * torch.randn(count, generator=generator, dtype=torch.float64)
    hidden, none = states(count, seed), torch.zeros(count, dtype=torch.float64)
    seen = Observation(hidden, hidden, budget, none, torch.arange(count), unsure, row, account)
    together = controller.decide(0, seen)
    loss, own = controller.predict(hidden).double().exp(), {}
    for token in range(count):
        over = own.get(int(row[token]), 0.0)
        price = (controller.dial.setting(budget[token : token + 1]) + FEEDBACK * (float(account[token]) + over)).exp()
        plan = int((loss[token] + price * controller.plan_costs).argmin())
        assert torch.equal(together.actions[token], controller.plans[plan, controller.start :])
        own[int(row[token])] = over + float(controller.plan_costs[plan] + together.cost - budget[token])


def test_what_a_text_could_not_save_below_the_floor_is_not_held_against_it():
    model = wrap(controller="routed", calibration=CALIBRATION, plans=["PSSP", "PSSS"])
    expect_cheap_plans_to_lose_more(model.controller)
    floor = model.controller.floor
    trace = model(token_ids(1, 200), energy_budget=0.0).execution
    assert float(trace.cost[0, 1:].mean()) == pytest.approx(floor, abs=0.05)
    torch.testing.assert_close(trace.account[0, -1], (trace.cost - floor).double().sum(), atol=1e-4, rtol=0)


def test_the_account_counts_every_token_once():
    model = wrap(controller="routed", calibration=CALIBRATION, bridge_rank=2)
    ids = token_ids(2, 9)
    budgets = torch.tensor([[0.5] * 4 + [1.0] * 2 + [0.8] * 3] * 2, dtype=torch.float64)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    trace = model(ids, attention_mask=mask, energy_budget=budgets).execution
    expected = ((trace.cost - budgets.clamp(min=model.controller.floor)) * mask).cumsum(dim=1)
    torch.testing.assert_close(trace.account, expected, atol=1e-6, rtol=0)
    assert trace.tokens(0, 3).rows(torch.tensor([1])).account.shape == (1, 3)
    assert model(ids, energy_budget=1.0).execution.account.abs().max() < 1e-9
