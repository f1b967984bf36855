"""Every kind of controller keeps to its budget, and decides on each token alone."""

import functools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

from modeling_anee.actions import Action, parse_plan
from modeling_anee.configuration_anee import CONFIDENCE_METRICS, AneeConfig
from modeling_anee.controllers import (
    CONTROLLER_CLASSES,
    Controller,
    LearnedController,
    Observation,
    PlanController,
    build_controller,
)
from modeling_anee.costs import CostTable


HIDDEN, VOCABULARY = 8, 16
STRETCH = 600  # tokens of a text that is long enough for its mean to be near the budget
EXACT = 1e-7
relaxed = settings(deadline=None, derandomize=True, max_examples=60)
seeds = st.integers(0, 2**31)
budgets = st.floats(0.0, 0.999)


@functools.cache
def text_config(layers: int) -> dict:
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": VOCABULARY}
    return LlamaConfig(num_hidden_layers=layers, **sizes).to_dict()


def random_costs(layers: int, seed: int = 0, head: float = 0.05) -> CostTable:
    """Layers of different cost, of which SKIP keeps between 1% and 30%."""
    generator = torch.Generator().manual_seed(seed)
    process = torch.rand(layers, 1, generator=generator, dtype=torch.float64) + 0.2
    skip = process * (0.01 + 0.29 * torch.rand(layers, 1, generator=generator, dtype=torch.float64))
    return CostTable(torch.cat([process, skip, skip], dim=1) / process.sum(), head, 1e5, "flops")


def build(kind: str, costs: CostTable, **fields) -> Controller:
    layers = len(costs.layers)
    fields = {"min_layers": min(1, layers), "keep_last_layers": min(1, layers - 1)} | fields
    controller = build_controller(AneeConfig(text_config=text_config(layers), controller=kind, **fields))
    controller.bind(costs)
    if kind == "learned":
        randomise(controller)
    return controller.requires_grad_(False)


def randomise(controller: LearnedController, seed: int = 0) -> None:
    """Weights under which the actions of a learned controller differ from token to token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter.copy_(2 * torch.randn(parameter.shape, generator=generator))


def run(
    controller: Controller,
    costs: CostTable,
    budget: Tensor | float,
    index: Tensor | None = None,
    hidden: Tensor | None = None,
    logits=None,
) -> tuple[Tensor, Tensor]:
    """Ask about N tokens as the executor does: actions [N, L] and costs float64 [N]."""
    count = next((len(x) for x in (hidden, index, budget) if isinstance(x, Tensor)), 1)
    index = torch.arange(count) if index is None else index
    hidden = states(count) if hidden is None else hidden
    budget = torch.as_tensor(budget, dtype=torch.float64).expand(count)
    actions, charges = torch.zeros(count, controller.num_layers, dtype=torch.uint8), torch.zeros(count, dtype=torch.float64)
    for segment, (start, stop) in enumerate(controller.segments):
        asked = torch.ones(count, dtype=torch.bool) if start == 0 else actions[:, start - 1] != Action.EXIT
        if not asked.any():
            break
        spent = (costs.of_actions(actions[:, :start]) + charges)[asked]
        seen = Observation(hidden[asked], 0.5 * hidden[asked], budget[asked], spent, index[asked], logits or unsure)
        decision = controller.decide(segment, seen)
        assert decision.actions.dtype == torch.uint8 and decision.actions.shape == (int(asked.sum()), stop - start)
        exits = (decision.actions == Action.EXIT).cumsum(dim=-1) > 0
        actions[asked, start:stop] = decision.actions.masked_fill(exits, Action.EXIT)
        charges[asked] += decision.cost
        actions[actions[:, stop - 1] == Action.EXIT, stop:] = Action.EXIT
    return actions, costs.of_actions(actions) + charges


def states(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def unsure(hidden: Tensor) -> Tensor:
    return torch.zeros(len(hidden), VOCABULARY)


@st.composite
def random_plans(draw, layers: int) -> list[str]:
    bodies = st.tuples(st.text(alphabet="PS", min_size=layers, max_size=layers), st.integers(0, layers))
    plans = st.builds(lambda pair: pair[0][: pair[1]] + "E" * (layers - pair[1]), bodies)
    return draw(st.lists(plans | st.text(alphabet="PS", min_size=layers, max_size=layers), min_size=1, max_size=5))


@st.composite
def layer_limits(draw, layers: int) -> dict[str, int]:
    return {"min_layers": draw(st.integers(0, layers)), "keep_last_layers": draw(st.integers(0, layers))}


# The budget is kept


@given(st.integers(1, 40), seeds, budgets, st.integers(0, 10**6), st.data())
@relaxed
def test_plan_keeps_the_budget_over_any_long_stretch(layers, seed, budget, start, data):
    costs = random_costs(layers, seed)
    fields = data.draw(st.sampled_from(["default", "order", "plans"]))
    if fields == "plans":
        controller = build("plan", costs, plans=data.draw(random_plans(layers)))
    elif fields == "order":
        order = data.draw(st.lists(st.integers(0, layers - 1), unique=True))
        controller = build("plan", costs, skip_order=order)
    else:
        controller = build("plan", costs, **data.draw(layer_limits(layers)))
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
    floors = {}
    for kept in (0, limits["keep_last_layers"]):
        cheapest = torch.full((layers,), Action.SKIP)
        cheapest[: limits["min_layers"]] = Action.PROCESS
        cheapest[layers - kept :] = Action.PROCESS
        floors[kept] = float(costs.of_actions(cheapest))
    lowest_skipping = floors[limits["keep_last_layers"]]
    exits = threshold > 0 and budget <= max(threshold, lowest_skipping)
    assert controller.floor == pytest.approx(floors[0] if threshold > 0 else lowest_skipping)
    assert abs(float(cost.mean()) - max(budget, controller.floor)) <= 0.02
    assert (actions != (Action.SKIP if exits else Action.EXIT)).all()


@pytest.mark.parametrize("kind", ["plan", "budget"])
@given(st.integers(1, 40), seeds, st.lists(budgets, min_size=2, max_size=8), st.data())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_no_token_costs_more_at_a_lower_budget(kind, layers, seed, values, data):
    costs = random_costs(layers, seed)
    fields = {"plans": data.draw(random_plans(layers))} if kind == "plan" else data.draw(layer_limits(layers))
    controller = build(kind, costs, **fields)
    spent = [run(controller, costs, budget, torch.arange(STRETCH))[1] for budget in sorted(values)]
    for lower, higher in zip(spent, spent[1:], strict=False):
        assert (lower <= higher + EXACT).all()


@given(st.integers(1, 20), seeds, st.data())
@relaxed
def test_plan_meets_the_cost_of_a_plan_with_that_plan_alone(layers, seed, data):
    costs = random_costs(layers, seed)
    plans = data.draw(random_plans(layers))
    chosen = torch.tensor(parse_plan(data.draw(st.sampled_from(plans))), dtype=torch.uint8)
    budget = float(costs.of_actions(chosen))
    assume(budget < 1.0)
    _, cost = run(build("plan", costs, plans=plans), costs, budget, torch.arange(50))
    assert cost.tolist() == pytest.approx([budget] * 50, abs=EXACT)


@given(st.integers(1, 24), seeds, budgets, st.floats(0, 1), st.sampled_from(CONFIDENCE_METRICS), st.data())
@relaxed
def test_confidence_never_costs_more_than_the_budget_or_the_floor(layers, seed, budget, threshold, metric, data):
    costs = random_costs(layers, seed, head=data.draw(st.floats(0, 0.5)))
    exits = data.draw(st.none() | st.lists(st.integers(0, layers - 1), unique=True))
    fields = {"exit_layers": exits, "confidence_metric": metric, "confidence_threshold": threshold}
    controller = build("confidence", costs, **fields)
    head = 3 * torch.randn(HIDDEN, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    _, cost = run(controller, costs, budget, hidden=states(40, seed), logits=lambda hidden: hidden @ head)
    assert (cost <= max(budget, controller.floor) + EXACT).all()
    assert (cost >= controller.floor - EXACT).all()


# A token alone decides


@pytest.mark.parametrize("kind", sorted(CONTROLLER_CLASSES))
@given(st.integers(1, 12), seeds, st.integers(2, 12), st.data())
@settings(deadline=None, derandomize=True, max_examples=25)
def test_decisions_do_not_depend_on_the_other_tokens(kind, layers, seed, tokens, data):
    costs = random_costs(layers, seed)
    controller = build(kind, costs, exit_budget_threshold=0.4, confidence_threshold=0.8)
    generator = torch.Generator().manual_seed(seed)
    budget = torch.rand(tokens, generator=generator, dtype=torch.float64)
    index = torch.randint(0, 1000, (tokens,), generator=generator)
    hidden = states(tokens, seed)
    head = 3 * torch.randn(HIDDEN, VOCABULARY, generator=generator)
    chosen = data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=4))
    together = run(controller, costs, budget, index, hidden, lambda states: states @ head)
    alone = run(controller, costs, budget[chosen], index[chosen], hidden[chosen], lambda states: states @ head)
    assert torch.equal(alone[0], together[0][chosen])
    torch.testing.assert_close(alone[1], together[1][chosen])


# Layers that are kept


@pytest.mark.parametrize("kind", ["plan", "budget", "learned"])
@given(st.integers(1, 12), seeds, st.data())
@settings(deadline=None, derandomize=True, max_examples=25)
def test_first_and_last_layers_are_kept(kind, layers, seed, data):
    limits = data.draw(layer_limits(layers))
    costs = random_costs(layers, seed)
    controller = build(kind, costs, **limits)
    actions, _ = run(controller, costs, torch.linspace(0, 0.999, 50, dtype=torch.float64))
    assert (actions[:, : limits["min_layers"]] == Action.PROCESS).all()
    last = actions[:, layers - limits["keep_last_layers"] :]
    assert ((last == Action.PROCESS) | (last == Action.EXIT)).all()
    if kind != "learned":
        assert (last == Action.PROCESS).all()


def test_plan_gives_up_the_layers_of_an_order_one_after_the_other():
    costs = random_costs(6)
    controller = build("plan", costs, skip_order=[4, 2, 3])
    actions, _ = run(controller, costs, torch.linspace(0, 0.999, 200, dtype=torch.float64))
    found = {"".join(Action(value).letter for value in row) for row in actions.tolist()}
    assert found == {"PPPPPP", "PPPPSP", "PPSPSP", "PPSSSP"}


def test_budget_exits_at_and_below_the_threshold_only():
    costs = random_costs(8)
    controller = build("budget", costs, exit_budget_threshold=0.5, keep_last_layers=2)
    actions, _ = run(controller, costs, torch.tensor([0.3, 0.5, 0.501, 0.9]), torch.full((4,), 3))
    assert [Action.EXIT in row for row in actions.tolist()] == [True, True, False, False]
    assert [Action.SKIP in row for row in actions.tolist()] == [False, False, True, True]
    assert (actions[2:, -2:] == Action.PROCESS).all() and (actions[:2, -1] == Action.EXIT).all()


def test_budget_processes_from_the_bottom():
    costs = random_costs(8)
    actions, _ = run(build("budget", costs), costs, torch.linspace(0, 0.999, 100, dtype=torch.float64))
    skipped = (actions[:, :-1] == Action.SKIP).int()
    assert (skipped.diff(dim=1) >= 0).all() and skipped.sum() > 0


# Confidence


def sure(hidden: Tensor) -> Tensor:
    return 50.0 * torch.nn.functional.one_hot(torch.zeros(len(hidden), dtype=torch.long), VOCABULARY).float()


@pytest.mark.parametrize("metric", CONFIDENCE_METRICS)
def test_confidence_exits_when_sure_and_goes_on_when_not(metric):
    costs = random_costs(8)
    controller = build("confidence", costs, confidence_metric=metric, confidence_threshold=0.5, exit_layers=[2, 5])
    process, leave = costs.layers[:, Action.PROCESS], costs.layers[:, Action.EXIT]
    actions, cost = run(controller, costs, 0.999, hidden=states(3), logits=sure)
    assert actions.tolist() == [[Action.PROCESS] * 2 + [Action.EXIT] * 6] * 3
    assert cost.tolist() == pytest.approx([float(process[:2].sum() + leave[2:].sum()) + costs.head] * 3)

    # With its own question, going on to the end would cost more than the whole budget.
    actions, cost = run(controller, costs, 0.999, hidden=states(3), logits=unsure)
    assert actions.tolist() == [[Action.PROCESS] * 5 + [Action.EXIT] * 3] * 3
    assert cost.tolist() == pytest.approx([float(process[:5].sum() + leave[5:].sum()) + costs.head] * 3)

    free = CostTable(costs.layers, 0.0, costs.stack, costs.unit)
    controller.bind(free)
    actions, cost = run(controller, free, 1.0 - 1e-12, hidden=states(3), logits=unsure)
    assert (actions == Action.PROCESS).all() and cost.tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("metric", CONFIDENCE_METRICS)
@given(seeds, st.floats(0.05, 0.95))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_confidence_compares_the_metric_with_the_threshold(metric, seed, threshold):
    costs = random_costs(4, head=0.0)
    controller = build("confidence", costs, confidence_metric=metric, confidence_threshold=threshold, exit_layers=[2])
    logits = 3 * torch.randn(20, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probabilities = logits.softmax(dim=-1)
    if metric == "entropy":
        expected = -(probabilities * probabilities.log()).sum(dim=-1) / math.log(VOCABULARY) < threshold
    else:
        expected = probabilities.amax(dim=-1) > threshold
    actions, _ = run(controller, costs, 1.0 - 1e-12, hidden=states(20), logits=lambda hidden: logits.float())
    assert torch.equal(actions[:, -1] == Action.EXIT, expected)


@given(st.integers(3, 16), seeds, budgets, st.floats(0, 1), st.floats(0, 0.3))
@relaxed
def test_confidence_charges_one_head_per_question(layers, seed, budget, threshold, head):
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
    torch.testing.assert_close(cost, costs.of_actions(actions) + asked * head, rtol=0, atol=1e-12)


def test_confidence_can_spend_a_budget_to_the_last_bit():
    head = 0.1  # more than float32 can hold
    costs = random_costs(9, head=head)
    controller = build("confidence", costs, exit_layers=[1, 2, 3, 4, 5, 6], confidence_threshold=0.0)
    process, leave = costs.layers[:, Action.PROCESS], costs.layers[:, Action.EXIT]
    for questions, stop in enumerate([2, 3, 4, 5, 6], start=1):
        budget = float(process[:stop].sum() + leave[stop:].sum()) + questions * head
        actions, cost = run(controller, costs, budget, hidden=states(1))
        assert actions.tolist() == [[Action.PROCESS] * stop + [Action.EXIT] * (9 - stop)]
        assert float(cost) == pytest.approx(budget, abs=1e-12)


def test_confidence_asks_nobody_who_cannot_go_on():
    costs = random_costs(6)
    controller = build("confidence", costs)

    def never(hidden: Tensor) -> Tensor:
        raise AssertionError("the head was asked in vain")

    _, cost = run(controller, costs, 0.0, hidden=states(4), logits=never)
    assert cost.tolist() == pytest.approx([controller.floor] * 4)


@pytest.mark.parametrize("fields", [{"exit_layers": []}, {"min_layers": 5}])
def test_confidence_without_exits_runs_everything(fields):
    controller = build("confidence", random_costs(5), **fields)
    assert controller.segments == [] and controller.floor == pytest.approx(1.0)


# Learned


@given(st.integers(1, 20), st.integers(1, 20), seeds, st.data())
@relaxed
def test_segments_of_learned_cover_the_layers_between_the_kept_ones_once(layers, interval, seed, data):
    limits = data.draw(layer_limits(layers))
    controller = build("learned", random_costs(layers, seed), decision_interval=min(interval, layers), **limits)
    covered = [layer for start, stop in controller.segments for layer in range(start, stop)]
    assert covered == list(range(limits["min_layers"], layers - limits["keep_last_layers"]))
    assert all(stop - start <= interval for start, stop in controller.segments)


@pytest.mark.parametrize("sizes", [[32], [], [4, 8]])
def test_learned_is_untrained_at_first_and_after_a_reset(sizes):
    costs = random_costs(6)
    fields = {"text_config": text_config(6), "controller": "learned", "controller_hidden_sizes": sizes}
    fields["decision_interval"] = 1
    controller = build_controller(AneeConfig(**fields))
    controller.bind(costs)
    budget = torch.linspace(0, 0.999, 200, dtype=torch.float64)
    with torch.no_grad():
        untrained, cost = run(controller, costs, budget)
        assert (untrained == Action.PROCESS).all()
        assert cost.tolist() == pytest.approx([1.0 + 4 * costs.of_module(controller)] * 200)
        randomise(controller)
        trained, _ = run(controller, costs, budget)
        assert (trained != Action.PROCESS).any()
        controller.reset_parameters()
        assert (run(controller, costs, budget)[0] == Action.PROCESS).all()


def test_learned_can_be_trained_from_the_start():
    controller = build_controller(AneeConfig(text_config=text_config(4), controller="learned"))
    one = torch.ones(3, dtype=torch.float64)
    seen = Observation(states(3), states(3, 1), one, 0 * one, torch.arange(3), unsure)
    controller.logits(0, seen).log_softmax(dim=-1)[:, Action.SKIP].sum().backward()
    assert controller.policy[-1].weight.grad.abs().sum() > 0


@given(st.integers(1, 12), seeds, budgets, st.integers(1, 4), st.data())
@relaxed
def test_learned_never_costs_less_than_its_floor(layers, seed, budget, interval, data):
    costs = random_costs(layers, seed)
    limits = data.draw(layer_limits(layers))
    controller = build("learned", costs, decision_interval=min(interval, layers), **limits)
    randomise(controller, seed)
    _, cost = run(controller, costs, budget, hidden=states(60, seed))
    assert (cost >= controller.floor - EXACT).all()


@pytest.mark.parametrize("action", [Action.SKIP, Action.EXIT])
def test_the_floor_of_learned_is_what_its_cheapest_policy_costs(action):
    costs = random_costs(6)
    controller = build("learned", costs)
    cost = {}
    for only in (Action.SKIP, Action.EXIT):
        controller.reset_parameters()
        controller.policy[-1].bias[only] = 9.0
        actions, spent = run(controller, costs, 0.5)
        assert set(actions[0, 1:-1].tolist()) == {only}
        cost[only] = float(spent)
    assert controller.floor == pytest.approx(min(cost.values())) and cost[action] >= controller.floor - EXACT


# All kinds


@pytest.mark.parametrize("kind", sorted(CONTROLLER_CLASSES))
def test_a_kind_is_built_by_name_and_marks_its_weights(kind):
    controller = build(kind, random_costs(4))
    assert type(controller) is CONTROLLER_CLASSES[kind]
    assert "format_version" in controller.state_dict()
    assert 0.0 < controller.floor <= 1.0 + EXACT


@pytest.mark.parametrize("kind", sorted(CONTROLLER_CLASSES))
@pytest.mark.parametrize("layers", [1, 2])
def test_few_layers_work(kind, layers):
    costs = random_costs(layers)
    controller = build(kind, costs, min_layers=0, keep_last_layers=0)
    actions, cost = run(controller, costs, 0.3, torch.arange(20))
    assert actions.shape == (20, layers) and cost.isfinite().all()


def test_an_interface_alone_binds_nothing():
    controller = Controller(AneeConfig(text_config=text_config(2)))
    with pytest.raises(NotImplementedError):
        controller.bind(random_costs(2))
    with pytest.raises(NotImplementedError):
        controller.decide(0, None)
    assert PlanController.reset_parameters is Controller.reset_parameters
