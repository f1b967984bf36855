"""`learned`: segments, what a policy may choose, what it costs, the price of the dial, and strict budgets."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_anee.actions import DEFAULT_TABLE, EXIT, PROCESS, SKIP
from modeling_anee.controller import Observation
from modeling_anee.controller_kinds import build_controller
from modeling_anee.controller_learned import allowed_actions, cap

from .fakes import (
    EXACT,
    budgets,
    build,
    configuration,
    fewer,
    layer_limits,
    random_costs,
    randomise,
    relaxed,
    run,
    seeds,
    states,
    unsure,
)


CHOICES = DEFAULT_TABLE.names[1:]


@st.composite
def any_fields(draw, layers: int) -> dict:
    """Limits, segments, choices and the layers that have bridges."""
    some_layers = st.none() | st.lists(st.integers(0, layers - 1), unique=True)
    return draw(layer_limits(layers)) | {
        "decision_interval": draw(st.integers(1, layers)),
        "controller_actions": draw(st.lists(st.sampled_from(CHOICES), unique=True)),
        "bridge_rank": draw(st.integers(0, 1)),
        "bridge_layers": draw(some_layers),
        "ffn_bridge_rank": draw(st.integers(0, 1)),
        "ffn_bridge_layers": draw(some_layers),
        "exit_translator_rank": draw(st.integers(0, 1)),
        "exit_layers": draw(some_layers),
    }


@given(st.integers(1, 20), st.integers(1, 20), seeds, st.data())
@relaxed
def test_segments_cover_the_layers_between_the_kept_ones_once(layers, interval, seed, data):
    limits = data.draw(layer_limits(layers))
    controller = build("learned", random_costs(layers, seed), decision_interval=min(interval, layers), **limits)
    covered = [layer for start, stop in controller.segments for layer in range(start, stop)]
    assert covered == list(range(limits["min_layers"], layers - limits["keep_last_layers"]))
    assert all(stop - start <= interval for start, stop in controller.segments)
    assert len(controller.probes) == len(controller.policies) == len(controller.segments)


@given(st.integers(1, 12), seeds, budgets, st.sampled_from(["average", "strict"]), st.data())
@relaxed
def test_only_what_is_allowed_is_chosen(layers, seed, budget, mode, data):
    fields = data.draw(any_fields(layers))
    costs = random_costs(layers, seed)
    controller = build("learned", costs, budget_mode=mode, **fields)
    randomise(controller, seed)
    actions, _ = run(controller, costs, budget, hidden=states(50, seed))
    allowed = allowed_actions(configuration("learned", layers, **fields))
    for token in actions.tolist():
        left = token.index(EXIT) if EXIT in token else layers
        assert all(allowed[layer][action] for layer, action in enumerate(token[: left + 1]))
        assert all(action == EXIT for action in token[left:])
    outside = [*range(fields["min_layers"]), *range(layers - fields["keep_last_layers"], layers)]
    assert all(allowed[layer] == [place == PROCESS for place in range(len(DEFAULT_TABLE))] for layer in outside)


def test_actions_are_allowed_where_they_have_their_bridge():
    def letters(**fields) -> list[str]:
        rows = allowed_actions(configuration("learned", 5, **fields))
        return ["".join(action.letter for action, has in zip(DEFAULT_TABLE, row, strict=True) if has) for row in rows]

    assert letters() == ["P", "PSEF", "PSEF", "PSEF", "P"]
    assert letters(bridge_layers=[1], ffn_bridge_layers=[], exit_layers=[2]) == letters()  # there are none
    assert letters(bridge_rank=2, bridge_layers=[0, 1]) == ["P", "PSEF", "PEF", "PEF", "P"]
    assert letters(ffn_bridge_rank=2, ffn_bridge_layers=[3]) == ["P", "PSE", "PSE", "PSEF", "P"]
    assert letters(exit_translator_rank=2, exit_layers=[2, 4]) == ["P", "PSF", "PSEF", "PSF", "P"]
    assert letters(controller_actions=["SKIP_FFN"], bridge_rank=2) == ["P", "PF", "PF", "PF", "P"]
    assert letters(controller_actions=[]) == ["P"] * 5


@pytest.mark.parametrize("sizes", [[32], [], [4, 8]])
@pytest.mark.parametrize("interval", [1, 3])
def test_untrained_at_first_and_after_a_reset(sizes, interval):
    costs = random_costs(6)
    controller = build_controller(configuration("learned", 6, controller_hidden_sizes=sizes, decision_interval=interval))
    controller.bind(costs)
    budget = torch.linspace(0, 0.999, 200, dtype=torch.float64)
    with torch.no_grad():
        untrained, cost = run(controller, costs, budget)
        assert (untrained == PROCESS).all()
        assert cost.tolist() == pytest.approx([1.0 + costs.of_module(controller)] * 200)
        randomise(controller)
        trained, _ = run(controller, costs, budget)
        assert len(trained.unique()) == len(DEFAULT_TABLE)
        controller.reset_parameters()
        assert (run(controller, costs, budget)[0] == PROCESS).all()


def test_can_be_trained_from_the_start():
    controller = build("learned", random_costs(8), decision_interval=3).requires_grad_(True)
    controller.reset_parameters()
    one = torch.ones(3, dtype=torch.float64)
    seen = Observation(states(3), states(3, 1), one, 0 * one, torch.arange(3), unsure)
    for segment, (start, stop) in enumerate(controller.segments):
        logits = controller.logits(segment, seen)
        assert logits.shape == (3, stop - start, len(DEFAULT_TABLE)) and logits.isfinite().all()
        logits.log_softmax(dim=-1)[..., SKIP].sum().backward()
        assert controller.policies[segment][-1].weight.grad.abs().sum() > 0


@given(st.integers(1, 8), seeds, st.data())
@relaxed
def test_the_floor_is_the_cheapest_way_through(layers, seed, data):
    """Against a search over every way that is allowed."""
    costs = random_costs(layers, seed)
    fields = data.draw(any_fields(layers))
    controller = build("learned", costs, **fields)
    allowed = allowed_actions(configuration("learned", layers, **fields))
    own = [costs.of_module(torch.nn.ModuleList(pair)) for pair in zip(controller.probes, controller.policies, strict=True)]
    best = float("inf")
    for left in range(layers + 1):
        if left < layers and not allowed[left][EXIT]:
            continue
        stay = [
            min(float(costs.layers[n, a]) for a in range(len(DEFAULT_TABLE)) if allowed[n][a] and a != EXIT)
            for n in range(left)
        ]
        deciding = sum(cost for (start, _), cost in zip(controller.segments, own, strict=True) if start <= left)
        best = min(best, sum(stay) + float(costs.layers[left:, EXIT].sum()) + deciding)
    assert controller.floor == pytest.approx(best + costs.head, abs=1e-12)


@given(st.integers(1, 12), seeds, budgets, st.sampled_from(["average", "strict"]), st.data())
@relaxed
def test_never_costs_less_than_its_floor_nor_strictly_more_than_the_budget(layers, seed, budget, mode, data):
    costs = random_costs(layers, seed)
    calibration = data.draw(st.sampled_from([None, {"budgets": [0.2, 0.8], "settings": [40.0, -5.0]}]))
    controller = build("learned", costs, budget_mode=mode, calibration=calibration, **data.draw(any_fields(layers)))
    randomise(controller, seed)
    _, cost = run(controller, costs, budget, hidden=states(60, seed))
    assert (cost >= controller.floor - EXACT).all()
    if mode == "strict":
        assert (cost <= max(budget, controller.floor) + EXACT).all()


@given(st.integers(2, 12), seeds, st.data())
@fewer
def test_a_strict_budget_at_the_floor_can_be_met(layers, seed, data):
    costs = random_costs(layers, seed)
    controller = build("learned", costs, budget_mode="strict", **data.draw(any_fields(layers)))
    randomise(controller, seed)
    _, cost = run(controller, costs, min(controller.floor, 0.999), hidden=states(30, seed))
    assert cost.tolist() == pytest.approx([controller.floor] * 30, abs=EXACT)


@given(st.integers(2, 10), seeds)
@fewer
def test_strict_changes_nothing_that_is_within_the_budget(layers, seed):
    costs = random_costs(layers, seed)
    average, strict = (build("learned", costs, budget_mode=mode, decision_interval=layers) for mode in ("average", "strict"))
    wanted, cost = run(average, costs, 0.7, hidden=states(60, seed))
    capped, _ = run(strict, costs, 0.7, hidden=states(60, seed))
    within = cost <= 0.7
    assert torch.equal(capped[within], wanted[within])


@given(st.integers(2, 10), seeds, st.lists(st.floats(-50, 50), min_size=2, max_size=5))
@fewer
def test_a_higher_price_never_costs_more_where_one_decision_sees_all(layers, seed, prices):
    """Per layer a higher price can only move the choice to a cheaper action."""
    costs = random_costs(layers, seed)
    spent = []
    for price in sorted(prices):
        calibration = {"budgets": [0.5], "settings": [price]}
        fields = {"controller_actions": ["SKIP", "SKIP_FFN"], "decision_interval": layers, "calibration": calibration}
        spent.append(run(build("learned", costs, **fields), costs, 0.5, hidden=states(30, seed))[1])
    for dear, cheap in itertools.pairwise(spent):
        assert (cheap <= dear + EXACT).all()


def test_the_price_is_that_of_each_tokens_budget():
    costs = random_costs(8)
    calibration = {"budgets": [0.2, 0.8], "settings": [1e4, -1e4]}
    controller = build("learned", costs, calibration=calibration, controller_actions=["SKIP"], decision_interval=3)
    actions, _ = run(controller, costs, torch.tensor([0.0, 0.2, 0.8, 0.9], dtype=torch.float64), hidden=states(4))
    assert actions[:2, 1:-1].tolist() == [[SKIP] * 6] * 2
    assert actions[2:, 1:-1].tolist() == [[PROCESS] * 6] * 2


def test_the_likeliest_actions_are_those_that_are_decided_until_a_token_leaves():
    costs = random_costs(8)
    calibration = {"budgets": [0.2, 0.8], "settings": [3.0, -1.0]}
    controller = build("learned", costs, calibration=calibration, decision_interval=3)
    budget = torch.full((40,), 0.6, dtype=torch.float64)
    for segment, (start, stop) in enumerate(controller.segments):
        spent = costs.head + torch.zeros_like(budget)
        seen = Observation(states(40), states(40, 1), budget, spent, torch.arange(40), unsure)
        offered = controller.probabilities(segment, seen)
        assert offered.shape == (40, stop - start, len(DEFAULT_TABLE))
        assert offered.sum(dim=-1).flatten().tolist() == pytest.approx([1.0] * 40 * (stop - start))
        assert torch.equal(offered.argmax(dim=-1), controller.decide(segment, seen).actions.long())


# cap


@st.composite
def cases(draw):
    generator = torch.Generator().manual_seed(draw(seeds))
    tokens, layers = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    costs = torch.rand(layers, len(DEFAULT_TABLE), generator=generator, dtype=torch.float64)
    worth = torch.randn(tokens, layers, len(DEFAULT_TABLE), generator=generator, dtype=torch.float64)
    actions = worth.argmax(dim=-1)
    cheapest = costs.argmin(dim=-1).expand(tokens, layers)
    left = layers * torch.rand(tokens, generator=generator, dtype=torch.float64)
    return actions, cheapest, worth, costs, left


def cost_of(actions, costs):
    return costs[torch.arange(len(costs)), actions].sum(dim=-1)


@given(cases())
@relaxed
def test_cap_is_never_over_what_is_left_unless_even_the_cheapest_do_not_fit(case):
    actions, cheapest, _, costs, left = case
    capped = cap(*case)
    assert ((capped == actions) | (capped == cheapest)).all()
    fits = cost_of(capped, costs) <= left + EXACT
    assert (fits | (capped == cheapest).all(dim=-1)).all()
    assert (fits | (cost_of(cheapest, costs) > left)).all()


@given(cases())
@relaxed
def test_cap_keeps_everything_that_fits(case):
    actions, _, _, costs, left = case
    fits = cost_of(actions, costs) <= left
    assert torch.equal(cap(*case)[fits], actions[fits])


@given(cases())
@relaxed
def test_cap_gives_up_the_least_missed_first(case):
    actions, cheapest, worth, _, _ = case
    capped = cap(*case)
    gain = (worth.gather(-1, actions.unsqueeze(-1)) - worth.gather(-1, cheapest.unsqueeze(-1))).squeeze(-1)
    changed = capped != actions
    kept_gain = gain.masked_fill(changed | (actions == cheapest), torch.inf).amin(dim=-1)
    lost_gain = gain.masked_fill(~changed, -torch.inf).amax(dim=-1)
    assert (lost_gain <= kept_gain).all()
