"""`confidence`: exits where the head is sure, pays for its questions, and keeps to a cap or to its calibration."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modeling_anee.actions import EXIT, PROCESS
from modeling_anee.budget import Dial
from modeling_anee.configuration_anee import CONFIDENCE_METRICS

from .fakes import (
    EXACT,
    HIDDEN,
    VOCABULARY,
    budgets,
    build,
    fewer,
    random_costs,
    random_head,
    relaxed,
    run,
    seeds,
    states,
    unsure,
)


CALIBRATION = {"budgets": [0.3, 0.6, 0.9], "settings": [0.9, 0.5, 0.1]}
every_metric = pytest.mark.parametrize("metric", CONFIDENCE_METRICS)


def sure(hidden: Tensor) -> Tensor:
    return 50.0 * torch.nn.functional.one_hot(torch.zeros(len(hidden), dtype=torch.long), VOCABULARY).float()


def exits_at(layer: int, layers: int) -> list[int]:
    return [PROCESS] * layer + [EXIT] * (layers - layer)


@given(st.integers(1, 24), seeds, budgets, st.floats(0, 1), st.sampled_from(CONFIDENCE_METRICS), st.data())
@relaxed
def test_no_token_costs_more_than_the_budget_or_the_floor_where_that_is_a_cap(layers, seed, budget, threshold, metric, data):
    """Uncalibrated it always is; calibrated, in strict mode."""
    costs = random_costs(layers, seed, head=data.draw(st.floats(0, 0.5)))
    exits = data.draw(st.none() | st.lists(st.integers(0, layers - 1), unique=True))
    fields = {"exit_layers": exits, "confidence_metric": metric, "confidence_threshold": threshold}
    if data.draw(st.booleans()):
        fields |= {"budget_mode": "strict", "calibration": CALIBRATION}
    controller = build("confidence", costs, **fields)
    _, cost = run(controller, costs, budget, hidden=states(40, seed), logits=random_head(seed))
    assert (cost <= max(budget, controller.floor) + EXACT).all()


@every_metric
def test_exits_when_sure_and_goes_on_when_not(metric):
    costs = random_costs(8)
    question = costs.head + costs.translator
    controller = build("confidence", costs, confidence_metric=metric, confidence_threshold=0.5, exit_layers=[2, 5])
    actions, cost = run(controller, costs, 0.999, hidden=states(3), logits=sure)
    assert actions.tolist() == [exits_at(2, 8)] * 3
    assert cost.tolist() == pytest.approx([float(costs.of_plans(torch.tensor(exits_at(2, 8)))) + question] * 3)

    # With its own question, going on to the end would cost more than the whole budget.
    actions, cost = run(controller, costs, 0.999, hidden=states(3), logits=unsure)
    assert actions.tolist() == [exits_at(5, 8)] * 3
    assert cost.tolist() == pytest.approx([float(costs.of_plans(torch.tensor(exits_at(5, 8)))) + question] * 3)

    free = dataclasses.replace(costs, layers=costs.layers / (1 - costs.head), head=0.0, translator=0.0)
    controller.bind(free)
    actions, cost = run(controller, free, 1.0 - 1e-12, hidden=states(3), logits=unsure)
    assert (actions == PROCESS).all() and cost.tolist() == pytest.approx([1.0] * 3)


@every_metric
@given(seeds, st.floats(0.05, 0.95))
@settings(fewer, max_examples=40)
def test_compares_the_metric_with_the_threshold(metric, seed, threshold):
    costs = dataclasses.replace(random_costs(4, head=0.0), translator=0.0)
    controller = build("confidence", costs, confidence_metric=metric, confidence_threshold=threshold, exit_layers=[2])
    logits = 3 * torch.randn(20, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    actions, _ = run(controller, costs, 1.0 - 1e-12, hidden=states(20), logits=lambda hidden: logits.float())
    assert torch.equal(actions[:, -1] == EXIT, is_sure(logits, metric, threshold))


def is_sure(logits: Tensor, metric: str, threshold: float | Tensor) -> Tensor:
    probabilities = logits.softmax(dim=-1)
    if metric == "entropy":
        return -(probabilities * probabilities.log()).sum(dim=-1) / math.log(logits.shape[-1]) < threshold
    return probabilities.amax(dim=-1) > threshold


@every_metric
@given(seeds)
@fewer
def test_calibrated_the_threshold_follows_the_budget_of_each_token(metric, seed):
    costs = random_costs(4, head=0.4)
    controller = build("confidence", costs, confidence_metric=metric, calibration=CALIBRATION, exit_layers=[2])
    budget = torch.tensor([0.0, 0.3, 0.6, 0.75, 0.9, 0.99], dtype=torch.float64).repeat(4)
    threshold = torch.tensor([0.9, 0.9, 0.5, 0.3, 0.1, 0.1], dtype=torch.float64).repeat(4)
    logits = 3 * torch.randn(24, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    actions, cost = run(controller, costs, budget, hidden=states(24), logits=lambda hidden: logits.float())
    assert torch.equal(actions[:, -1] == EXIT, is_sure(logits, metric, threshold))
    torch.testing.assert_close(cost, costs.of_plans(actions) + costs.head + costs.translator)
    assert (cost >= controller.floor - EXACT).all() and controller.floor == pytest.approx(float(cost.min()))


def test_a_dial_that_is_put_in_later_takes_the_cap_off():
    """As calibration does, while it looks for the settings."""
    costs = random_costs(6, head=0.3)
    controller, calibrated = build("confidence", costs), build("confidence", costs, calibration=CALIBRATION)
    capped = run(controller, costs, 0.5, hidden=states(20), logits=random_head(0))
    controller.dial = Dial(CALIBRATION, neutral=0.0)
    expected = run(calibrated, costs, 0.5, hidden=states(20), logits=random_head(0))
    assert torch.equal(run(controller, costs, 0.5, hidden=states(20), logits=random_head(0))[0], expected[0])
    assert not torch.equal(capped[0], expected[0])


@given(st.integers(3, 16), seeds, budgets, st.floats(0, 1), st.floats(0, 0.3))
@relaxed
def test_charges_one_head_and_translator_per_question(layers, seed, budget, threshold, head):
    costs = random_costs(layers, seed, head=head)
    controller = build("confidence", costs, confidence_threshold=threshold, exit_layers=[layers // 2, layers - 1])
    hidden = states(10, seed)
    asked = torch.zeros(10, dtype=torch.float64)
    matrix = 3 * torch.randn(HIDDEN, VOCABULARY, generator=torch.Generator().manual_seed(seed))

    def logits(some: Tensor) -> Tensor:
        for state in some:
            asked[(hidden == state).all(dim=1)] += 1
        return some @ matrix

    actions, cost = run(controller, costs, budget, hidden=hidden, logits=logits)
    expected = costs.of_plans(actions) + asked * (costs.head + costs.translator)
    torch.testing.assert_close(cost, expected, rtol=0, atol=1e-12)


def test_can_spend_a_budget_to_the_last_bit():
    costs = random_costs(9, head=0.1)  # more than float32 can hold
    controller = build("confidence", costs, exit_layers=[1, 2, 3, 4, 5, 6], confidence_threshold=0.0)
    for questions, stop in enumerate([2, 3, 4, 5, 6], start=1):
        budget = float(costs.of_plans(torch.tensor(exits_at(stop, 9)))) + questions * (costs.head + costs.translator)
        actions, cost = run(controller, costs, budget, hidden=states(1))
        assert actions.tolist() == [exits_at(stop, 9)]
        assert float(cost) == pytest.approx(budget, abs=1e-12)


def test_asks_nobody_who_cannot_go_on():
    costs = random_costs(6)
    controller = build("confidence", costs)

    def never(hidden: Tensor) -> Tensor:
        raise AssertionError("the head was asked in vain")

    _, cost = run(controller, costs, 0.0, hidden=states(4), logits=never)
    assert cost.tolist() == pytest.approx([controller.floor] * 4)


@pytest.mark.parametrize("fields", [{"exit_layers": []}, {"min_layers": 5}, {"exit_layers": [], "calibration": CALIBRATION}])
def test_without_exits_everything_runs(fields):
    controller = build("confidence", random_costs(5), **fields)
    assert controller.segments == [] and controller.floor == pytest.approx(1.0)
