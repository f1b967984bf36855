"""The stage `routing`: what a router learns, and that an interrupted fit makes the same."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_anee.bridges import normalised
from modeling_anee.controller_routed import RoutedController
from modeling_anee.evaluation.rollout import run as run_tokens
from modeling_anee.evaluation.rollout import with_plan
from modeling_anee.hardware import GATHERING_FLOPS
from modeling_anee.training.fit import fit
from modeling_anee.training.losses import kl_divergence
from modeling_anee.training.run import Run
from modeling_anee.training.stages import routing

from .workshop import assert_same_run, fit_killed_in, make_workshop, recipe_of


AS_SHIPPED = GATHERING_FLOPS["cpu"]  # the other process has it, and so has the module's fixture
ANEE = {
    "controller": "routed",
    "bridge_rank": 4,
    "ffn_bridge_rank": 4,
    "plans": ["PFPP", "PFSP", "PFSF"],
    "router_budgets": [0.8, 0.6, 0.3],
    "controller_hidden_sizes": [16],
}
STAGES = {
    "closed_form": {"windows": 12, "ridge": 0.001},
    "routing": {"steps": 200, "learning_rate": 0.01, "batch_windows": 4, "budgets": [0.4, 0.95], "checkpoint_every": 2},
    "calibration": {"windows": 6, "budgets": [0.5, 0.7, 0.9]},
}


def recipe(folder):
    sources = {
        "train": [{"file": "text.txt", "tokens": 400, "stop": 0.6}],
        "calibrate": [{"file": "text.txt", "tokens": 400, "start": 0.6}],
    }
    return recipe_of(folder, length=16, text=sources, anee=ANEE, stages=STAGES)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workshop")
    make_workshop(folder)
    fit(recipe(folder), folder / "run", folder / "data")
    return folder


def test_an_artifact_that_loads_and_keeps_its_budgets(fitted):
    model = AutoModelForCausalLM.from_pretrained(fitted / "run" / "artifact", dtype="float32")
    assert isinstance(model.controller, RoutedController)
    table = model.config.calibration
    assert table["settings"] == sorted(table["settings"], reverse=True)
    trace = model(torch.randint(3, 60, (1, 400), generator=torch.Generator().manual_seed(0)), energy_budget=0.7).execution
    assert abs(trace.mean_cost - 0.7) <= 0.02
    assert len(trace.cost.unique()) > 2


def test_the_artifact_names_the_plans_that_it_was_trained_on(fitted):
    model = AutoModelForCausalLM.from_pretrained(fitted / "run" / "artifact", dtype="float32")
    config, controller = model.config, model.controller
    plans = [config.table.plan(config.plans[place], config.num_layers) for place in config.router_plans]
    assert controller.plans[1:].tolist() == plans and len(plans) == len(ANEE["router_budgets"])
    config.router_plans = None
    controller.bind(model.costs)
    assert controller.plans[1:].tolist() == plans  # as by their budgets


def test_the_base_is_bit_identical(fitted):
    before = AutoModelForCausalLM.from_pretrained(fitted / "base").state_dict()
    after = AutoModelForCausalLM.from_pretrained(fitted / "run" / "artifact", dtype="float32").base.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_router_learns_which_tokens_lose_more(fitted):
    """Predicted losses go up and down with those that the plans have on the text it learned from."""
    run = Run.open(recipe(fitted), fitted / "run", fitted / "data")
    model, ids = run.model, run.windows("train")
    controller, entering = routing.controller_of(model), []
    target = model.stack.logits(run_tokens(model, ids, keep=entering))
    actions = with_plan(model, ids, controller.plans[3])
    kl = kl_divergence(target, model.stack.logits(run_tokens(model, ids, actions)))[:, 1:]
    with torch.no_grad():
        predicted = controller.predict(entering[controller.start][:, 1:])[..., 3]
    pair = torch.stack((predicted.flatten(), kl.flatten().clamp(min=1e-6).log()))
    assert torch.corrcoef(pair)[0, 1] > 0.3


def test_a_fit_killed_and_resumed_makes_the_same(fitted, forks, tmp_path, monkeypatch):
    monkeypatch.setitem(GATHERING_FLOPS, "cpu", AS_SHIPPED)
    fit_killed_in(forks, "routing", recipe(fitted), tmp_path / "run", fitted / "data")
    fit(recipe(fitted), tmp_path / "run", fitted / "data")
    assert_same_run(tmp_path / "run", fitted / "run")


@pytest.mark.parametrize("budget", [0.4, 0.6, 0.85])
def test_plans_of_a_batch_meet_its_budget(budget):
    generator = torch.Generator().manual_seed(0)
    costs = torch.tensor([1.0, 0.8, 0.5, 0.3], dtype=torch.float64)
    predicted = torch.randn(2, 500, 4, generator=generator).sort(dim=-1).values
    chosen = routing.choose(predicted, costs, torch.tensor(budget), generator)
    assert chosen.shape == (2, 500) and abs(float(costs[chosen].mean()) - budget) < 0.01


def test_what_standardises_can_be_folded_into_the_weights(fitted):
    controller = routing.controller_of(Run.open(recipe(fitted), fitted / "run", fitted / "data").model)
    hidden = torch.randn(20, 32)
    seen = normalised(hidden)
    standard = routing.Standard(seen.mean(dim=0), 1.0 / seen.std(dim=0))
    with torch.no_grad():
        expected = standard.predict(controller, hidden)
        standard.fold(controller)
        torch.testing.assert_close(controller.predict(hidden), expected, atol=1e-4, rtol=1e-4)


def test_another_kind_has_no_router(fitted, tmp_path):
    run = Run.open(recipe_of(fitted), tmp_path / "run", fitted / "data")
    with pytest.raises(ValueError, match="controller='learned' has no router"):
        routing.run_stage(run)


IN_FEWER_BITS = {
    "controller": "routed",
    "precisions": ["int8", "int4"],
    "bridge_rank": 4,
    "ffn_bridge_rank": 4,
    "plans": [
        "4*INT8 / int8",
        "4*INT8 / int4",
        "INT8, INT8_SKIP_FFN, 2*INT8 / int4",
        "INT8, INT8_SKIP_FFN, SKIP_INT8, INT8 / int4",
        "INT8, INT8_SKIP_FFN, SKIP_INT8, INT8_SKIP_FFN / int4",
    ],
    "controller_hidden_sizes": [16],
}
STAGES_IN_FEWER_BITS = {
    "closed_form": {"windows": 12, "ridge": 0.001},
    "refit": {"windows": 12, "ridge": 0.001, "budgets": [0.24, 0.2]},
    "bridges": {"steps": 30, "learning_rate": 0.01, "batch_windows": 4, "budgets": [0.15, 0.25]},
    "routing": {"steps": 60, "learning_rate": 0.01, "batch_windows": 4},
    "calibration": {"windows": 6, "budgets": [0.2, 0.4, 0.7]},
}


@pytest.fixture(scope="module")
def in_fewer_bits(fitted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bits")
    fields = {"text": recipe(fitted).text, "anee": IN_FEWER_BITS, "stages": STAGES_IN_FEWER_BITS}
    made = recipe_of(fitted, length=16, **fields)
    fit(made, folder / "run", fitted / "data")
    return folder / "run"


def test_bridges_and_router_learn_under_plans_in_fewer_bits(in_fewer_bits):
    rows = [json.loads(line) for line in (in_fewer_bits / "log.jsonl").read_text().splitlines()]
    for stage, name in (("bridges", "loss"), ("routing", "misfit")):
        values = [row[name] for row in rows if row["stage"] == stage]
        assert sum(values[-10:]) < sum(values[:10]), stage
    costs = [row["cost"] for row in rows if row["stage"] == "routing"]
    model = AutoModelForCausalLM.from_pretrained(in_fewer_bits / "artifact", dtype="float32")
    assert max(costs) < model.controller.top and min(costs) >= float(model.controller.plan_costs.min()) - 1e-6


def test_the_dial_stands_still_where_plans_are_fixed(in_fewer_bits):
    model = AutoModelForCausalLM.from_pretrained(in_fewer_bits / "artifact", dtype="float32")
    table, top = model.config.calibration, model.controller.top
    assert table["budgets"] == sorted([0.2, 0.4, 0.7, round(top, 4)]) and 0.2 < top < 0.4
    assert len(set(table["settings"][1:])) == 1 and table["settings"][0] > table["settings"][1]
    ids = torch.randint(3, 60, (1, 400), generator=torch.Generator().manual_seed(0))
    for budget in (0.2, (0.2 + top) / 2, 0.4, 0.7):
        assert abs(model(ids, energy_budget=budget).execution.mean_cost - budget) <= 0.02
