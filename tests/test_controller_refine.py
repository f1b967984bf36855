"""`refine`: plans below and above its range, how doubt is measured, who runs again, and that budgets are kept."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_anee.configuration_anee import DOUBT_METRICS

from .fakes import EXACT, build, configuration, fewer, random_costs, run, seeds


CALIBRATION = {"budgets": [0.2, 0.9], "settings": [3.0, -3.0]}


def chosen(controller, doubts, budget, account=0.0, rows=None):
    """Who of N tokens of a row runs again, bool [N]."""
    count = len(doubts)
    rows = torch.zeros(count, dtype=torch.int64) if rows is None else rows
    return controller.choose(
        torch.as_tensor(doubts, dtype=torch.float64),
        torch.full((count,), budget, dtype=torch.float64),
        torch.full((count,), account, dtype=torch.float64),
        rows,
    )


@given(st.integers(2, 12), seeds, st.floats(0.0, 0.999))
@fewer
def test_below_its_top_the_first_plan_runs_above_fixed_ones(layers, seed, budget):
    costs = random_costs(layers, seed)
    controller = build("refine", costs, keep_first_tokens=0)
    actions, cost = run(controller, costs, budget, torch.arange(50))
    assert controller.floor == pytest.approx(controller.cost) and controller.cost <= controller.top <= 1.0 + EXACT
    if budget < controller.top - EXACT:
        assert (actions == controller.first).all() and cost.tolist() == pytest.approx([controller.cost] * 50)
    else:
        table = controller.table.costs
        assert all(float((table - one).abs().min()) < EXACT for one in cost)
    assert all(controller.top - EXACT <= one <= 1.0 + EXACT for one in controller.plan_budgets())


def test_its_plans_are_those_of_the_configuration():
    costs = random_costs(4)
    controller = build("refine", costs, refine_plans=["PSSP", "PPSP"], refine_from=2)
    assert controller.first.tolist() == [0, 1, 1, 0] and controller.again.tolist() == [0, 0, 1, 0]
    assert controller.charge == pytest.approx(float(costs.layers[2, 1] + costs.layers[3, 0]) + costs.head)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"refine_plans": ["PPPP"]}, "must be a list of two plans"),
        ({"refine_plans": "PPPP"}, "must be a list of two plans"),
        ({"refine_plans": ["PPPP", "PPP"]}, "unknown action"),
        ({"refine_plans": ["PPEE", "PPPP"]}, "leaves the stack early"),
        ({"refine_plans": ["PPPP / int8", "PPPP"]}, "head 'int8'"),
        ({"refine_from": 5}, "refine_from=5 is not allowed"),
        ({"refine_from": -1}, "refine_from=-1 is not allowed"),
    ],
)
def test_other_plans_and_layers_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        configuration("refine", 4, **fields)


def test_margin_is_for_refine_alone():
    with pytest.raises(ValueError, match="confidence_metric='margin' is not allowed"):
        configuration("confidence", 4, confidence_metric="margin")


@pytest.mark.parametrize("metric", DOUBT_METRICS)
def test_doubt_is_in_nats_and_falls_as_one_token_stands_out(metric):
    controller = build("refine", random_costs(4), confidence_metric=metric)
    logits = torch.zeros(4, 16)
    logits[torch.arange(4), 3] = torch.tensor([0.0, 1.0, 4.0, 20.0])
    doubts = controller.doubt(logits)
    assert doubts.dtype == torch.float64 and doubts.tolist() == sorted(doubts.tolist(), reverse=True)
    assert doubts[0] == pytest.approx({"entropy": 2.7726, "max_probability": 2.7726, "margin": 0.0}[metric], abs=1e-4)
    assert doubts[3] == pytest.approx({"entropy": 0.0, "max_probability": 0.0, "margin": -20.0}[metric], abs=1e-4)


@given(seeds, st.floats(0.05, 0.95), st.floats(-1.5, 1.5))
@fewer
def test_a_text_that_is_harder_or_easier_keeps_its_budget(seed, share, shift):
    controller = build("refine", random_costs(6, 1), calibration=CALIBRATION)
    budget = controller.cost + share * (controller.top - controller.cost)
    doubts = torch.randn(2000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift
    cost = controller.cost + controller.charge * chosen(controller, doubts, budget).double().mean()
    assert abs(float(cost) - budget) < 0.02


def test_rows_have_accounts_of_their_own_and_go_on_from_what_was_spent():
    controller = build("refine", random_costs(6, 1), calibration=CALIBRATION)
    budget, doubts = (controller.cost + controller.top) / 2, torch.randn(80, dtype=torch.float64)
    both = chosen(controller, doubts.repeat(2), budget, rows=torch.arange(2).repeat_interleave(80))
    alone = chosen(controller, doubts, budget)
    assert torch.equal(both, alone.repeat(2))
    spent = float((controller.cost + controller.charge * alone[:30] - budget).sum())
    assert torch.equal(chosen(controller, doubts[30:], budget, account=spent), alone[30:])
    assert chosen(controller, doubts, budget, account=50.0).sum() < alone.sum()


def test_strict_tokens_run_again_only_where_their_own_budget_affords_both():
    costs = random_costs(6, 2)
    controller = build("refine", costs, budget_mode="strict", calibration=CALIBRATION)
    assert not chosen(controller, [9.0] * 5, controller.top - 1e-6).any()
    assert chosen(controller, [9.0, -9.0], controller.cost + controller.charge).tolist() == [True, False]
