"""Controllers: those of plans, and what all kinds share; the other kinds have tests of their own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_anee import AneeForCausalLM
from modeling_anee import controller_kinds as controllers
from modeling_anee.actions import PROCESS, SKIP
from modeling_anee.budget import Dial
from modeling_anee.controller import Controller, Decision
from modeling_anee.controller_kinds import CONTROLLER_CLASSES
from modeling_anee.controller_plan import PlanController

from .fakes import EXACT, build, configuration, fewer, random_costs, random_head, run, seeds, states
from .tiny import CONTROLLERS, tiny_base, token_ids


every_kind = pytest.mark.parametrize("kind", sorted(CONTROLLER_CLASSES))


@every_kind
@pytest.mark.parametrize("mode", ["average", "strict"])
@given(st.integers(1, 12), seeds, st.integers(2, 12), st.data())
@fewer
def test_decisions_do_not_depend_on_the_other_tokens(kind, mode, layers, seed, tokens, data):
    costs = random_costs(layers, seed)
    fields = {"exit_budget_threshold": 0.4, "confidence_threshold": 0.8, "decision_interval": data.draw(st.integers(1, 4))}
    controller = build(kind, costs, budget_mode=mode, **fields)
    generator = torch.Generator().manual_seed(seed)
    budget = torch.rand(tokens, generator=generator, dtype=torch.float64)
    index = torch.randint(0, 1000, (tokens,), generator=generator)
    hidden = states(tokens, seed)
    chosen = data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=4))
    together = run(controller, costs, budget, index, hidden, random_head(seed))
    alone = run(controller, costs, budget[chosen], index[chosen], hidden[chosen], random_head(seed))
    assert torch.equal(alone[0], together[0][chosen])
    torch.testing.assert_close(alone[1], together[1][chosen])


@every_kind
def test_a_kind_is_built_by_name_and_marks_its_weights(kind):
    controller = build(kind, random_costs(4))
    assert type(controller) is CONTROLLER_CLASSES[kind] and set(CONTROLLER_CLASSES) == set(CONTROLLERS)
    assert "format_version" in controller.state_dict()
    assert 0.0 < controller.floor <= 1.0 + EXACT


@pytest.mark.parametrize("kind", ["confidence", "learned", "routed"])
def test_another_dial_is_a_copys_and_the_calibration_is_read_when_bound(kind):
    costs = random_costs(6)
    table = {"budgets": [0.3, 0.9], "settings": [0.9, 0.1]}
    controller, calibrated = build(kind, costs), build(kind, costs, calibration=table)
    dial = controller.dial
    twin = controller.with_dial(Dial(table, neutral=0.0))
    assert controller.dial is dial and not dial.calibrated and twin.dial.calibrated
    own, shared = controller.state_dict(keep_vars=True), twin.state_dict(keep_vars=True)
    assert own.keys() == shared.keys() and all(own[name] is shared[name] for name in own)
    arguments = (costs, 0.5, None, states(20), random_head(0))
    assert torch.equal(run(twin, *arguments)[0], run(calibrated, *arguments)[0])
    controller._config.calibration = table
    controller.bind(costs)
    assert torch.equal(controller.dial.settings, calibrated.dial.settings)


@every_kind
def test_first_tokens_are_kept_in_average_mode_only(kind):
    assert build(kind, random_costs(4), keep_first_tokens=3).keep_first == 3
    assert build(kind, random_costs(4), keep_first_tokens=3, budget_mode="strict").keep_first == 0


@every_kind
@pytest.mark.parametrize("mode", ["average", "strict"])
@pytest.mark.parametrize("layers", [1, 2])
def test_few_layers_work(kind, mode, layers):
    costs = random_costs(layers)
    controller = build(kind, costs, min_layers=0, keep_last_layers=0, budget_mode=mode)
    actions, cost = run(controller, costs, 0.3, torch.arange(20))
    assert actions.shape == (20, layers) and cost.isfinite().all()


def test_an_interface_alone_binds_nothing():
    controller = Controller(configuration("plan", 2))
    with pytest.raises(NotImplementedError):
        controller.bind(random_costs(2))
    with pytest.raises(NotImplementedError):
        controller.decide(0, None)
    assert PlanController.reset_parameters is Controller.reset_parameters


class EveryOther(Controller):
    """Skips every other layer, whatever the budget."""

    needs_hidden = False

    def __init__(self, config):
        super().__init__(config)
        self.segments, self._skip = [(0, self.num_layers)], config.table.skip

    def bind(self, costs):
        self._plan = torch.tensor([self._skip * (layer % 2) for layer in range(self.num_layers)], dtype=torch.uint8)
        self.floor = float(costs.of_plans(self._plan))

    def decide(self, segment, seen):
        return Decision(self._plan.expand(len(seen.budget), -1))


def test_a_controller_is_added_by_one_row(monkeypatch, tmp_path):
    monkeypatch.setitem(controllers.CONTROLLER_CLASSES, "every other", EveryOther)
    tiny_base().save_pretrained(tmp_path / "base")
    model = AneeForCausalLM.from_base(tmp_path / "base", controller="every other")
    trace = model.generate(token_ids(1), energy_budget=0.5, max_new_tokens=4, return_dict_in_generate=True).execution
    assert (trace.actions[:, 1:] == torch.tensor([PROCESS, SKIP, PROCESS, SKIP], dtype=torch.uint8)).all()
    assert trace.cost[0, 1] == pytest.approx(model.controller.floor)
    model.save_pretrained(tmp_path / "artifact")
    loaded = AneeForCausalLM.from_pretrained(tmp_path / "artifact")
    assert torch.equal(loaded(token_ids(), energy_budget=0.5).logits, model(token_ids(), energy_budget=0.5).logits)
