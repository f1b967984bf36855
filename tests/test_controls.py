"""Controls: what they spend is what was asked, static plans are the `plan` controller's, and the model stays as it was."""

import pytest
import torch

from modeling_anee.actions import PROCESS
from modeling_anee.data.windows import windows
from modeling_anee.evaluation.controls import (
    WithoutBridges,
    controls,
    follow,
    plan_table,
    random_skip,
    score_control,
    static,
    steps_down,
)
from modeling_anee.evaluation.perplexity import score
from modeling_anee.training.oracle import oracle

from .tiny import BRIDGES, tiny_base, token_ids, wrap


PLANS = ["PPSP", "PFSP", "SFSP", "SFSF"]
TOKENS = 100


@pytest.fixture(scope="module")
def model():
    """Random bridges, and plans with both kinds of skip."""
    return wrap(tiny_base(), "plan", plans=PLANS, **BRIDGES)


@pytest.fixture(scope="module")
def text():
    return windows(token_ids(1, 4 * TOKENS)[0], TOKENS)


def named(model):
    return {control.name: control for control in controls(model)}


@pytest.mark.parametrize("budget", [0.95, 0.8, 0.7])
@pytest.mark.parametrize("name", ["random skip, same bridges", "static plan, same bridges", "static plan, no bridges"])
def test_a_control_spends_its_budget(model, text, name, budget):
    scores = score_control(model, named(model)[name], text, budget)
    assert abs(scores.mean_cost - budget) < 0.03


def test_static_plans_are_those_of_the_plan_controller(model, text):
    ids = token_ids(2, TOKENS)
    control = named(model)["static plan, same bridges"]
    for budget in (0.9, 0.75, 0.5):
        expected = model(ids, energy_budget=budget)
        hidden, actions, head = static(model, ids, budget)
        assert torch.equal(actions, expected.execution.actions) and not head.any()
        torch.testing.assert_close(model.stack.logits(hidden), expected.logits)
        own, plain = score_control(model, control, text, budget), score(model, text, budget)
        torch.testing.assert_close(own.nll, plain.nll, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own.cost, plain.cost, rtol=1e-5, atol=1e-5)


def test_without_bridges_is_a_model_that_never_had_any(model, text):
    bare = wrap(model.base, "plan", plans=PLANS)
    control = named(model)["static plan, no bridges"]
    own, plain = score_control(model, control, text, 0.7), score(bare, text, 0.7)
    torch.testing.assert_close(own.nll, plain.nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.cost, plain.cost, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(own.nll, score_control(model, named(model)["static plan, same bridges"], text, 0.7).nll)


def test_bridges_are_in_place_afterwards_even_after_an_error(model):
    ids = token_ids(1, 20)
    executor, before = model.executor, model(ids, energy_budget=0.6).logits
    bare = WithoutBridges(model)
    bare.static(ids, 0.6)
    assert model.executor is executor
    with pytest.raises(AttributeError):
        bare.static(None, 0.6)
    assert model.executor is executor and torch.equal(model(ids, energy_budget=0.6).logits, before)


def test_without_bridges_the_models_own_executor_has_no_part(model, monkeypatch):
    ids, bare = token_ids(1, 20), WithoutBridges(model)
    expected = wrap(model.base, "plan", plans=PLANS)(ids, energy_budget=0.6)

    def refuse(*args, **kwargs):
        raise AssertionError("the model's own executor ran")

    for runner in (model.executor, model.executor.layers):
        monkeypatch.setattr(runner, "run", refuse)
    found = bare.static(ids, 0.6)
    assert torch.equal(found.actions, expected.execution.actions)
    torch.testing.assert_close(model.stack.logits(found.hidden), expected.logits)


def test_random_skips_are_among_those_of_the_cheapest_plan_and_repeatable(model):
    ids = token_ids(2, TOKENS)
    hidden, actions, _ = random_skip(model, ids, 0.8)
    again = random_skip(model, ids, 0.8)
    assert torch.equal(hidden, again.hidden) and torch.equal(actions, again.actions)
    cheapest = plan_table(model.config, model.costs).actions[0]
    assert ((actions == PROCESS) | (actions == cheapest)).all()
    assert len(actions.flatten(0, 1).unique(dim=0)) > 3  # tokens differ
    assert (actions[:, : model.config.keep_first_tokens] == PROCESS).all()


@pytest.fixture(scope="module")
def precise(model):
    """The same base, whose default plans go through 8 and 4 bits before anything is left out."""
    return wrap(model.base, "plan", precisions=["int8", "int4"], **BRIDGES)


@pytest.mark.parametrize("budget", [0.9, 0.5, 0.3, 0.2, 0.12])
@pytest.mark.parametrize("name", ["random skip, same bridges", "static plan, same bridges", "static plan, no bridges"])
def test_a_control_spends_its_budget_in_precisions_too(precise, text, name, budget):
    cost = score_control(precise, named(precise)[name], text, budget).mean_cost
    own = score(precise, text, budget).mean_cost
    assert abs(cost - own) < 0.01 and abs(own - max(budget, precise.controller.floor)) < 0.02


def test_static_plans_of_precisions_have_the_controllers_heads(precise, text):
    ids, heads = token_ids(2, TOKENS), set()
    for budget in (0.95, 0.6, 0.3, 0.15):
        expected, found = precise(ids, energy_budget=budget), static(precise, ids, budget)
        assert torch.equal(found.actions, expected.execution.actions) and torch.equal(found.head, expected.execution.head)
        heads |= set(found.head.unique().tolist())
        control = named(precise)["static plan, same bridges"]
        own, plain = score_control(precise, control, text, budget), score(precise, text, budget)
        torch.testing.assert_close(own.nll, plain.nll, rtol=1e-3, atol=1e-1)
        torch.testing.assert_close(own.cost, plain.cost, rtol=1e-5, atol=1e-5)
    assert heads == {2}


def test_random_layers_get_the_next_cheaper_action_at_the_cost_of_the_plan(precise):
    ids, table = token_ids(2, TOKENS), precise.config.table
    process, int8, int4, skip = (table.place(name) for name in ("PROCESS", "INT8", "INT4", "SKIP_INT4"))
    steps = steps_down(precise)
    cheapest = plan_table(precise.config, precise.costs).actions[0]
    assert steps[0].eq(process).all() and steps[1].eq(int8).all() and steps[2].eq(int4).all()
    assert torch.equal(steps[-1], cheapest) and skip in cheapest and len(steps) == 4
    for budget, expected in ((0.6, {process, int8}), (0.22, {int8, int4}), (0.13, {int4, skip})):
        found, plan = random_skip(precise, ids, budget), static(precise, ids, budget)
        kept = precise.config.keep_first_tokens
        assert set(found.actions[:, kept:].unique().tolist()) == expected, budget
        assert torch.equal(found.head, plan.head)
        assert not table.where([not action.is_whole for action in table])[found.actions[:, :kept].long()].any()
        assert len(found.actions.flatten(0, 1).unique(dim=0)) > len(plan.actions.flatten(0, 1).unique(dim=0))


def test_the_oracle_skips_all_that_it_may_or_nothing(model):
    ids, damage = token_ids(2, 30), torch.ones(4)
    cheapest = plan_table(model.config, model.costs).actions[0]
    hidden, actions = oracle(model, ids, damage, torch.inf)
    followed, expected, _ = follow(model, ids, cheapest.expand(*ids.shape, -1))
    assert torch.equal(actions, expected)
    torch.testing.assert_close(hidden, followed)
    dense = model(ids, energy_budget=1.0).logits
    for threshold in (-torch.inf, 0.0):
        hidden, actions = oracle(model, ids, damage, threshold)
        assert (actions == PROCESS).all()
        torch.testing.assert_close(model.stack.logits(hidden), dense)


def test_the_oracle_leaves_out_what_is_missed_least(model):
    ids = token_ids(1, TOKENS)
    costs = [
        float(model.costs.of_plans(oracle(model, ids, torch.ones(4), threshold)[1]).mean())
        for threshold in (1e-3, 1.0, 10.0, 1e3, 1e9)
    ]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]


def test_plans_with_an_exit_are_refused(model):
    with pytest.raises(ValueError, match="plans with EXIT are not allowed"):
        controls(wrap(model.base, "plan", plans=["PPEE"]))
