"""The stages of a fit together, on a tiny base: what they make, and that an interrupted fit makes the same."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_anee import AneeForCausalLM
from modeling_anee.actions import PROCESS, SKIP, SKIP_FFN
from modeling_anee.hardware import GATHERING_FLOPS
from modeling_anee.plans import plan_table
from modeling_anee.training.fit import fit
from modeling_anee.training.recipe import Recipe
from modeling_anee.training.stages.bridges import dearest_with_gaps, sample_plans
from modeling_anee.training.stages.calibration import ROUNDS, TOLERANCE, monotone, root

from .tiny import BRIDGES, tiny_base, wrap
from .workshop import assert_same_run, fit_killed_in, make_workshop, recipe_fields


AS_SHIPPED = GATHERING_FLOPS["cpu"]  # the other process has it, and so has the module's fixture
BUDGETS = [0.5, 0.7, 0.9]
STEPS = {"steps": 4, "learning_rate": 0.01, "checkpoint_every": 2}
STAGES = {
    "closed_form": {"windows": 12, "ridge": 0.001},
    "plans": {"windows": 2, "lowest_budget": 0.4},
    "refit": {"windows": 12, "ridge": 0.001, "budgets": BUDGETS},
    "bridges": STEPS | {"batch_windows": 2, "budgets": [0.4, 0.95]},
    "exits": STEPS | {"batch_windows": 2},
    "traces": {"windows": 6, "kl_windows": 2},
    "probe": STEPS,
    "supervised": STEPS | {"batch_tokens": 16},
    "reinforcement": STEPS
    | {"batch_windows": 2, "entropy_bonus": 0.01, "savings_weight": 1.0, "adherence_weight": 1.0, "quality_gate": 0.5},
    "calibration": {"windows": 6, "budgets": BUDGETS},
}
ANEE = {
    "controller": "learned",
    "decision_interval": 1,
    "bridge_rank": 4,
    "ffn_bridge_rank": 4,
    "exit_translator_rank": 4,
    "exit_layers": [2],
    "controller_actions": ["SKIP", "SKIP_FFN"],
    "keep_last_layers": 0,
}


def small_recipe(folder) -> Recipe:
    text = {"train": {"tokens": 400, "stop": 0.6}, "choose": {"tokens": 40, "start": 0.6, "stop": 0.7}}
    text["calibrate"] = {"tokens": 400, "start": 0.7}
    sources = {part: [{"file": "text.txt", **fields}] for part, fields in text.items()}
    return Recipe.model_validate(recipe_fields(folder, length=16, text=sources, anee=ANEE, stages=STAGES))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A folder with a base, its recipe, and the folder of a finished fit."""
    folder = tmp_path_factory.mktemp("workshop")
    make_workshop(folder)
    fit(small_recipe(folder), folder / "run", folder / "data")
    return folder


def artifact(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "run" / "artifact", dtype="float32")


def test_a_fit_runs_every_stage_and_exports_an_artifact_that_loads(fitted):
    state = json.loads((fitted / "run" / "run.json").read_text())
    assert state["done"] == list(STAGES)
    model = artifact(fitted)
    assert isinstance(model, AneeForCausalLM) and model.config.controller == "learned"
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("base.")}
    assert all(value.abs().sum() > 0 for name, value in own.items() if name.endswith("up.weight"))


def test_the_base_is_bit_identical_after_a_fit(fitted):
    before = AutoModelForCausalLM.from_pretrained(fitted / "base").state_dict()
    after = artifact(fitted).base.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_plans_are_nested_and_cheaper_and_cheaper(fitted):
    model = artifact(fitted)
    plans = [model.config.table.plan(plan, model.config.num_layers) for plan in model.config.plans]
    for longer, shorter in zip(plans[:-1], plans[1:], strict=True):
        changed = [(a, b) for a, b in zip(longer, shorter, strict=True) if a != b]
        assert len(changed) == 1 and changed[0][0] in (PROCESS, SKIP_FFN) and changed[0][1] in (SKIP, SKIP_FFN)
    costs = [float(model.costs.of_plans(torch.tensor([plan]))) for plan in plans]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] <= STAGES["plans"]["lowest_budget"] or PROCESS not in plans[-1][1:]  # as far as asked, or as there is


def test_only_layers_with_a_bridge_are_skipped(fitted):
    model = artifact(fitted)
    trace = model(torch.randint(3, 60, (2, 16)), energy_budget=0.5).execution
    for action, layers in ((SKIP, model.config.bridge_layers), (SKIP_FFN, model.config.ffn_bridge_layers)):
        taken = (trace.actions == action).flatten(0, 1).any(dim=0).nonzero().flatten().tolist()
        assert set(taken) <= set(layers)


def test_the_calibrated_budget_is_kept(fitted):
    table = artifact(fitted).config.calibration
    assert table["budgets"] == BUDGETS and table["settings"] == sorted(table["settings"], reverse=True)
    for budget, cost in zip(table["budgets"], table["cost"], strict=True):
        # A tiny model on few tokens, whose first one is always processed; the real one is held to 0.02.
        assert abs(cost - max(budget, artifact(fitted).controller.floor)) < 0.1


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_fit_killed_in_a_stage_and_resumed_makes_the_same(fitted, forks, stage, tmp_path, monkeypatch):
    monkeypatch.setitem(GATHERING_FLOPS, "cpu", AS_SHIPPED)
    recipe = small_recipe(fitted)
    fit_killed_in(forks, stage, recipe, tmp_path / "run", fitted / "data")
    fit(recipe, tmp_path / "run", fitted / "data")
    assert_same_run(tmp_path / "run", fitted / "run")


def sampled(model, table, ids, budgets, generator):
    """Actions that bridges are tuned under."""
    return sample_plans(model, table, ids, budgets, generator, dearest_with_gaps(model, table))[0]


def test_budgets_to_tune_at_spread_evenly_over_the_logarithm_of_what_they_leave_out(fitted):
    asked = []

    class Table:
        costs = torch.tensor([0.3, 0.97, 1.0])
        actions = torch.tensor([[PROCESS, SKIP, SKIP, PROCESS], [PROCESS, SKIP, PROCESS, PROCESS], [PROCESS] * 4])

        heads = torch.zeros(3, dtype=torch.uint8)

        def places(self, budget, index):
            asked.append(budget)
            return torch.zeros(len(budget), dtype=torch.int64)

    ids = torch.zeros(50, 40, dtype=torch.long)
    for seed in range(8):
        sampled(artifact(fitted), Table(), ids, (0.36, 0.96), torch.Generator().manual_seed(seed))
    left_out = 1.0 - torch.cat(asked)
    assert left_out.min() >= 0.04 - 1e-9 and left_out.max() <= 0.64 + 1e-9
    assert abs(float((left_out < 0.16).double().mean()) - 0.5) < 0.05


@pytest.mark.parametrize("slope", [0.3, 2.0, 5.0])
@pytest.mark.parametrize("place", [-380.0, -3.0, 0.0, 12.5, 390.0])
def test_a_root_is_found_in_few_steps(slope, place):
    asked = []

    def function(x):
        asked.append(x)
        return torch.sigmoid(torch.tensor(slope * (x - place) / 40, dtype=torch.float64)).item() - 0.5

    found = root(function, -400.0, 400.0)
    assert abs(function(found)) <= TOLERANCE and len(asked) <= ROUNDS + 1


def test_without_a_root_the_end_is_approached():
    assert root(lambda x: 1.0, -400.0, 400.0) < -399 and root(lambda x: -1.0, 0.0, 1.0) > 0.99


def test_monotone_averages_what_is_out_of_order():
    assert monotone([3.0, 1.0, 2.0, 5.0], True) == [2.0, 2.0, 2.0, 5.0]
    assert monotone([5.0, 2.0, 1.0], False) == [5.0, 2.0, 1.0]


@torch.no_grad()
def test_bridges_are_tuned_under_plans_that_leave_something_out():
    model = wrap(tiny_base(), precisions=["int4"], plans=["4*INT4 / int4", "INT4, SKIP_INT4, 2*INT4 / int4"], **BRIDGES)
    table, ids = plan_table(model.config, model.costs), torch.randint(3, 60, (1, 8))
    for seed in range(8):
        actions = sampled(model, table, ids, (0.1, 0.9), torch.Generator().manual_seed(seed))
        assert (actions[:, 1:, 1] == model.config.table.place("SKIP_INT4")).any()
    whole = wrap(tiny_base(), precisions=["int4"], plans=["4*INT4 / int4"], **BRIDGES)
    with pytest.raises(ValueError, match="no plan leaves anything out"):
        sampled(whole, plan_table(whole.config, whole.costs), ids, (0.1, 0.9), torch.Generator())
