"""The stage `calibration`: what it measures on, and what gives no figure. `test_stages.py` and others run it whole."""

import math

import pytest
import torch

from modeling_anee.budget import Dial
from modeling_anee.training.run import Run
from modeling_anee.training.stages import calibration

from .workshop import make_workshop, recipe_of, tiny_tokenizer


BUDGETS = [0.5, 0.9]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workshop")
    make_workshop(folder)
    return folder


def opened(workshop, folder, windows=3, controller="plan"):
    recipe = recipe_of(
        workshop,
        text={"calibrate": [{"file": "text.txt", "tokens": 200}]},
        anee={"controller": controller, "decision_interval": 1},
        stages={"calibration": {"windows": windows, "budgets": BUDGETS}},
    )
    return Run.open(recipe, folder, workshop / "data")


def test_windows_begin_as_the_tokenizer_begins_every_text_and_that_is_not_scored(workshop, tmp_path, monkeypatch):
    run, scored, score = opened(workshop, tmp_path), [], calibration.score
    run.tokenizer = tiny_tokenizer(begins_with_bos=True)
    monkeypatch.setattr(
        calibration, "score", lambda model, windows, budget: scored.append(windows) or score(model, windows, budget)
    )
    table = calibration.run_stage(run)["calibration"]
    assert table.keys() == {"budgets", "cost", "perplexity_ratio", "standard_error"} and len(scored) == 3
    for window in scored[0]:
        assert len(window.ids) == 8 and window.ids.tolist().index(1) == 0 and window.context == 1


def test_a_single_window_has_no_standard_error(workshop, tmp_path):
    table = calibration.run_stage(opened(workshop, tmp_path, windows=1))["calibration"]
    assert table.keys() == {"budgets", "cost", "perplexity_ratio"}
    assert all(math.isfinite(value) for column in table.values() for value in column)


def test_a_base_that_computes_no_numbers_is_named_with_window_and_budget(workshop, tmp_path):
    run = opened(workshop, tmp_path)
    with torch.no_grad():
        run.model.base.lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="window 1 of 3 at budget 1 has no score"):
        calibration.run_stage(run)


@pytest.mark.parametrize(("controller", "settings"), [("learned", [0.0, 30.0]), ("confidence", [0.2, 0.99])])
def test_measuring_at_a_setting_leaves_the_model_as_it_is(workshop, tmp_path, controller, settings):
    run = opened(workshop, tmp_path, controller=controller)
    model, windows = run.model, run.windows("calibrate")[:3]
    parts = [model.executor, model.controller, model.controller.dial, model.costs]
    costs = [calibration.mean_cost(run, windows, 0.5, setting) for setting in settings]
    after = [model.executor, model.controller, model.controller.dial, model.costs]
    assert all(one is other for one, other in zip(parts, after, strict=True)) and costs[0] != costs[1]
    for setting, cost in zip(settings, costs, strict=True):
        model.controller.dial = Dial({"budgets": [0.5], "settings": [setting]}, neutral=0.0)
        assert cost == pytest.approx(model(windows, energy_budget=0.5).execution.mean_cost, abs=1e-6)


def test_a_refine_controller_is_calibrated_by_how_unsure_its_first_plan_is(workshop, tmp_path):
    run = opened(workshop, tmp_path, controller="refine")
    windows, kind = run.windows("calibrate")[:3], run.model.controller
    cost_of = calibration.mean_costs_of_refinement(run, windows)
    for setting in (99.0, -99.0):  # nobody runs again, and all do
        assert cost_of(0.5, setting) == pytest.approx(calibration.mean_cost(run, windows, 0.5, setting), abs=1e-6)
    table = calibration.run_stage(run)["calibration"]
    assert table["budgets"] == [0.5, 0.9] and table["settings"] == sorted(table["settings"], reverse=True)
    assert run.model.controller is kind and kind.dial.calibrated and table["cost"][0] >= kind.floor - 1e-6


def test_a_base_that_was_cast_meanwhile_is_measured_as_it_is(workshop, tmp_path):
    run = opened(workshop, tmp_path, controller="learned")
    windows, before = run.windows("calibrate")[:3], run.model.executor
    run.model.base.to(torch.bfloat16)
    executor = calibration.executor_at(run.model, 0.0)
    assert run.model.executor is not before and executor.costs is run.model.costs
    uncalibrated = run.model(windows, energy_budget=0.5).execution.mean_cost  # a setting of 0
    assert calibration.mean_cost(run, windows, 0.5, 0.0) == pytest.approx(uncalibrated, abs=1e-6)


def test_a_router_or_a_cost_that_is_no_number_is_named(workshop, tmp_path):
    run = opened(workshop, tmp_path, controller="routed")
    with torch.no_grad():
        run.model.controller.predictor[-1].bias.fill_(math.nan)
    with pytest.raises(ValueError, match="what the router predicts of the text is not a number"):
        calibration.run_stage(run)
    with pytest.raises(ValueError, match="budget 0.5 can't be calibrated: at the setting 0 the mean cost is nan"):
        calibration.find_setting(run.model, lambda budget, setting: math.nan, 0.5)
